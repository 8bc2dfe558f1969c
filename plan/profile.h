#pragma once

#include <vector>

namespace moed {

// What a machine does alone and what its parts cost each other, in bytes and FLOP a microsecond: the numbers that plans
// and bounds are made of.
struct MachineProfile {
  double link_bytes = 0.0;       // host memory to device memory
  double device_bytes = 0.0;     // device memory
  double device_flops = 0.0;     // products
  double host_bytes = 0.0;       // host memory, everybody together
  double host_flops = 0.0;       // products, all compute threads
  double attention_bytes = 0.0;  // KV, attention on the host, all compute threads
  double attention_flops = 0.0;
  // The share of the link that is left when the host's threads take some share of host memory's bandwidth: a polyline
  // of shares from 0 to 1, ascending; empty: all of it.
  struct Point {
    double host_share = 0.0;
    double link_share = 1.0;
  };
  std::vector<Point> interference;

  double link_left(double host_share) const;
};

}  // namespace moed
