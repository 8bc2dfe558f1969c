#include "kernels/host/onednn.h"

#include <cstring>
#include <oneapi/dnnl/dnnl.hpp>
#include <unordered_map>
#include <vector>

#include "base/check.h"

// From OpenMP's runtime. Its header belongs to one compiler, the function to all.
extern "C" void omp_set_num_threads(int num_threads);

namespace moed {
namespace {

using Type = dnnl::memory::data_type;
using Tag = dnnl::memory::format_tag;

int64_t key_of(int32_t k, int32_t n) { return int64_t{k} << 32 | n; }

// What one thread hands to one primitive; only the addresses change from call to call.
struct Call {
  dnnl::memory x;
  dnnl::memory w;
  dnnl::memory y;
  dnnl::memory scratchpad;
  std::unordered_map<int, dnnl::memory> arguments;
};

struct Product {
  dnnl::matmul primitive;
  std::vector<Call> calls;  // [threads]
};

struct Thread {
  std::vector<Bf16> x;   // [kRows, k_max]
  std::vector<float> y;  // [kRows, n_max]
};

}  // namespace

struct OneDnn::State {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  int32_t k_max;
  int32_t n_max;
  std::vector<Thread> threads;
  std::unordered_map<int64_t, Product> products;  // empty calls: oneDNN has no such primitive

  Product make(int32_t k, int32_t n) {
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    const dnnl::matmul::desc desc({{kRows, k}, Type::bf16, Tag::ab}, {{k, n}, Type::bf16, Tag::ba},
                                  {{kRows, n}, Type::f32, Tag::ab});
    const dnnl::matmul::primitive_desc primitive_desc(desc, attributes, engine);
    Product product{dnnl::matmul(primitive_desc), {}};
    for (size_t thread = 0; thread < threads.size(); ++thread) {
      Call call;
      call.x = dnnl::memory(primitive_desc.src_desc(), engine, nullptr);
      call.w = dnnl::memory(primitive_desc.weights_desc(), engine, nullptr);
      call.y = dnnl::memory(primitive_desc.dst_desc(), engine, threads[thread].y.data());
      call.scratchpad = dnnl::memory(primitive_desc.scratchpad_desc(), engine);
      call.arguments = {{DNNL_ARG_SRC, call.x},
                        {DNNL_ARG_WEIGHTS, call.w},
                        {DNNL_ARG_DST, call.y},
                        {DNNL_ARG_SCRATCHPAD, call.scratchpad}};
      product.calls.push_back(std::move(call));
    }
    return product;
  }
};

bool OneDnn::is_built() { return true; }

OneDnn::OneDnn(int num_threads, int32_t k_max, int32_t n_max) : state_(std::make_unique<State>()) {
  state_->k_max = k_max;
  state_->n_max = n_max;
  state_->threads.resize(num_threads);
  for (Thread& thread : state_->threads) {
    thread.x.resize(int64_t{kRows} * k_max);
    thread.y.resize(int64_t{kRows} * n_max);
  }
}

OneDnn::~OneDnn() = default;

bool OneDnn::prepare(int32_t k, int32_t n) {
  if (k > state_->k_max || n > state_->n_max) return false;
  const auto found = state_->products.find(key_of(k, n));
  if (found != state_->products.end()) return !found->second.calls.empty();
  // A primitive is made for the number of threads that OpenMP promises at this moment.
  omp_set_num_threads(1);
  Product product;
  try {
    product = state_->make(k, n);
  } catch (const dnnl::error&) {
    product = Product{};
  }
  return !state_->products.emplace(key_of(k, n), std::move(product)).first->second.calls.empty();
}

namespace {

// The rows as one matrix: where they stand already, or copied.
const Bf16* gather(const DotBlock& block, bool gathered, std::vector<Bf16>& copy) {
  bool dense = true;
  for (int32_t row = 1; row < block.m; ++row) dense = dense && block.x[row] == block.x[0] + int64_t{row} * block.k;
  if (dense) return block.x[0];
  for (int32_t row = 0; row < block.m && !gathered; ++row) {
    std::memcpy(static_cast<void*>(copy.data() + int64_t{row} * block.k), block.x[row], block.k * sizeof(Bf16));
  }
  return copy.data();
}

void add_in(const DotBlock& block, const float* sums) {
  for (int32_t row = 0; row < block.m; ++row, sums += block.n) {
    float* y = block.y[row] + block.y_begin;
    for (int32_t i = 0; i < block.n; ++i) {
      const float sum = block.bias == nullptr ? sums[i] : sums[i] + block.bias[i];
      y[i] = block.accumulate ? y[i] + sum : sum;
    }
  }
}

}  // namespace

void OneDnn::run(const DotBlock& block, bool x_gathered, int thread) {
  const auto found = state_->products.find(key_of(block.k, block.n));
  MOED_CHECK(found != state_->products.end() && block.m == kRows) << block.m << " rows, k " << block.k;
  Call& call = found->second.calls[thread];
  Thread& buffers = state_->threads[thread];
  omp_set_num_threads(1);
  try {
    call.x.set_data_handle(const_cast<Bf16*>(gather(block, x_gathered, buffers.x)));
    call.w.set_data_handle(const_cast<Bf16*>(block.w));
    found->second.primitive.execute(state_->stream, call.arguments);
  } catch (const dnnl::error& error) {
    MOED_CHECK(false) << "oneDNN: " << error.what();
  }
  add_in(block, buffers.y.data());
}

}  // namespace moed
