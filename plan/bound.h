#pragma once

#include "model/config.h"
#include "plan/plan.h"
#include "plan/policies.h"
#include "plan/profile.h"

namespace moed {

// The least that a pass has to move and compute under a policy, whatever the schedule.
struct LeastWork {
  double link_bytes = 0.0;    // experts that must come over the link
  double shared_bytes = 0.0;  // experts that come over the link or are read by the host, whichever
  double shared_flops = 0.0;  // of the same on the host
  double host_bytes = 0.0;    // experts that only the host may run
  double host_flops = 0.0;
  double attention_bytes = 0.0;  // KV of attention on the host
  double attention_flops = 0.0;
  double device_bytes = 0.0;  // weights and KV that the device reads
  double device_flops = 0.0;  // products of all rows there, not rounded up
};

// For routers that choose evenly; host_kv_share: of the attended tokens, those whose KV lies on the host. Weights are
// read once a pass, activations are free; where a policy keeps what came, the slots hold what helps most.
LeastWork least_work(const ModelConfig& config, const StepShape& shape, const Planning& planning, double host_kv_share);

// No schedule is faster: each part alone at its own rate, the link and the host as they slow each other. Microseconds.
struct Bound {
  double link_us = 0.0;
  double host_us = 0.0;
  double device_us = 0.0;
  double us() const;
  const char* binding() const;  // "link", "host" or "device"
};
Bound closed_form_bound(const MachineProfile& machine, const LeastWork& work);

}  // namespace moed
