#pragma once

#include <cstdint>
#include <vector>

#include "kernels/ops.h"

namespace moed::reference {

// Slow and plain versions of the ops in double, from the same bf16 and fp32 inputs. Nothing is shared with kernels/.

std::vector<double> to_double(const Bf16* x, int64_t n);
std::vector<double> to_double(const float* x, int64_t n);

// What a result may miss: c * sqrt(k) * eps * norm, norm being the root of the sum of the squared terms that were
// added. The only place where a tolerance is made.
constexpr double kEpsFloat = 5.9604644775390625e-8;  // 2^-24
constexpr double kEpsBf16 = 0.00390625;              // 2^-8
double tolerance(double eps, double k, double norm);
// What tensor cores may miss beside: they cut the sum off after every eight products (Fasi, Higham, Mikaitis, Pranesh,
// "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7, 2021), always toward zero, so that errors of k
// terms do not cancel. magnitude: the most that the sum is likely to reach.
double truncation(double k, double magnitude);

struct Checked {
  std::vector<double> value;
  std::vector<double> norm;  // of the terms of each value
};

// [rows, out]
Checked linear(Matrix<const Bf16> x, const LinearWeights& weights);
// [rows, hidden]
std::vector<double> rms_norm(Matrix<const float> x, const float* weight, double eps);

struct Rope {
  std::vector<double> q;  // [rows, heads * dim]
  std::vector<double> k;  // [rows, kv_heads * dim]
  std::vector<double> v;
};
Rope rope(const RopeAppend& args);

// [rows, heads * dim]; norm: the largest |v| that took part.
Checked attention(const Attention& args, int32_t rows);

struct Routed {
  std::vector<double> scores;   // [rows, experts]
  std::vector<int32_t> chosen;  // [rows, top_k]
  std::vector<double> weights;  // [rows, top_k + shared]
  std::vector<double> gap;      // [rows]: smallest difference of two scores that decided something
};
Routed route(const Route& args);

// A row of `logits` sampled by a full sort. margin: how near the nearest decision was to going another way: a share of
// the weights for draws and top_p, of a token's weight for min_p.
struct Sampled {
  int32_t token = 0;
  double margin = 1.0;
};
Sampled sample(std::span<const float> logits, const SampleRow& row);

// One row through one expert: [hidden].
Checked ffn(const Bf16* x, const BlobView& weights);

}  // namespace moed::reference
