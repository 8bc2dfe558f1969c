#include "cuda_port.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/reduce.cuh"

namespace moed::cuda {
namespace {

constexpr int kRowThreads = 256;

__global__ void embed_rows(const int32_t* tokens, Matrix<const Bf16> table, Matrix<float> out) {
  const int64_t row = blockIdx.x;
  const Bf16* from = table.data + tokens[row] * table.stride;
  float* to = out.data + row * out.stride;
  for (int i = static_cast<int>(threadIdx.x); i < table.cols; i += kRowThreads) to[i] = from_bf16(from[i].bits);
}

// rows null: row b is block b.
__global__ void __launch_bounds__(kRowThreads)
    normalise_rows(Matrix<const float> x, const int32_t* rows, const float* weight, float eps, Matrix<Bf16> out) {
  MOED_SHARED(float, partials, kRowThreads / kWarpSize);
  const int64_t row = rows == nullptr ? static_cast<int64_t>(blockIdx.x) : rows[blockIdx.x];
  const float* from = x.data + row * x.stride;
  Bf16* to = out.data + blockIdx.x * out.stride;
  float squares = 0.0F;
  for (int i = static_cast<int>(threadIdx.x); i < x.cols; i += kRowThreads) squares += from[i] * from[i];
  const float mean = block_sum<kRowThreads>(squares, partials) / static_cast<float>(x.cols);
  const float factor = 1.0F / sqrtf(mean + eps);
  for (int i = static_cast<int>(threadIdx.x); i < x.cols; i += kRowThreads) {
    to[i].bits = to_bf16(from[i] * factor * weight[i]);
  }
}

// The arguments of Combine that kernels need, pointers instead of spans.
struct CombineRows {
  Matrix<const float> y;
  Matrix<const float> weights;
  int32_t choices;
  Matrix<float> residual;
  Matrix<const float> host_y;
  Matrix<const int32_t> experts;
  const std::byte* const* host_blobs;
};

// Where the y of a choice lies, and what it counts.
struct Term {
  const float* y;
  float weight;
};

__device__ inline Term term_of(const CombineRows& args, int64_t row, int32_t choice) {
  // A shared expert has no column among the experts: it runs where the rows are.
  const bool on_host = args.host_y.data != nullptr && choice < args.experts.cols &&
                       args.host_blobs[args.experts.data[row * args.experts.stride + choice]] != nullptr;
  const Matrix<const float>& y = on_host ? args.host_y : args.y;
  return {y.data + (row * args.choices + choice) * y.stride,
          args.weights.data == nullptr ? 1.0F : args.weights.data[row * args.weights.stride + choice]};
}

// A block some columns of a row, several a thread: the host's table is read once a block.
__global__ void __launch_bounds__(kRowThreads) combine_rows(CombineRows args) {
  MOED_DYNAMIC_SHARED(Term, terms);
  const int64_t row = blockIdx.x;
  for (int choice = static_cast<int>(threadIdx.x); choice < args.choices; choice += kRowThreads) {
    terms[choice] = term_of(args, row, choice);
  }
  __syncthreads();
  float* residual = args.residual.data + row * args.residual.stride;
  const int step = static_cast<int>(gridDim.y) * kRowThreads;
  for (int i = static_cast<int>(blockIdx.y * kRowThreads + threadIdx.x); i < args.residual.cols; i += step) {
    float sum = residual[i];
    for (int choice = 0; choice < args.choices; ++choice) sum = fmaf(terms[choice].weight, terms[choice].y[i], sum);
    residual[i] = sum;
  }
}

__global__ void add_bias_rows(const float* bias, Matrix<float> y) {
  const int column = static_cast<int>(blockIdx.y * kRowThreads + threadIdx.x);
  if (column < y.cols) y.data[blockIdx.x * y.stride + column] += bias[column];
}

// wide: rows are whole multiples of 16 bytes and begin at such.
__global__ void move_rows(Matrix<const Bf16> from, Matrix<Bf16> to, bool wide) {
  const Bf16* source = from.data + blockIdx.x * from.stride;
  Bf16* target = to.data + blockIdx.x * to.stride;
  const int begin = static_cast<int>(blockIdx.y * kRowThreads + threadIdx.x);
  const int step = static_cast<int>(gridDim.y) * kRowThreads;
  if (wide) {
    for (int i = begin * 8; i < from.cols; i += step * 8) store_16(target + i, load_16(source + i));
  } else {
    for (int i = begin; i < from.cols; i += step) target[i].bits = source[i].bits;
  }
}

bool is_wide(const void* data, int64_t stride_elements) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_elements % 8 == 0;
}

dim3 rows_by_columns(int64_t rows, int64_t columns) {
  return {static_cast<unsigned>(rows), static_cast<unsigned>(divide_up(columns, kRowThreads))};
}

}  // namespace

void embed(std::span<const int32_t> tokens, Matrix<const Bf16> table, Matrix<float> out, const Launch& launch) {
  run_kernel(embed_rows, dim3{static_cast<unsigned>(tokens.size())}, dim3{kRowThreads}, 0, launch.stream, tokens.data(),
             table, out);
}

void rms_norm(Matrix<const float> x, std::span<const int32_t> rows, const float* weight, float eps, Matrix<Bf16> out,
              const Launch& launch) {
  const int64_t count = rows.empty() ? x.rows : static_cast<int64_t>(rows.size());
  run_kernel(normalise_rows, dim3{static_cast<unsigned>(count)}, dim3{kRowThreads}, 0, launch.stream, x,
             rows.empty() ? nullptr : rows.data(), weight, eps, out);
}

void combine(const Combine& args, const Launch& launch) {
  const CombineRows rows{args.y,      args.weights, args.choices,          args.residual,
                         args.host_y, args.experts, args.host_blobs.data()};
  constexpr int kColumnsAThread = 4;
  run_kernel(combine_rows, rows_by_columns(args.residual.rows, divide_up(args.residual.cols, kColumnsAThread)),
             dim3{kRowThreads}, args.choices * int64_t{sizeof(Term)}, launch.stream, rows);
}

void add_bias(const float* bias, Matrix<float> y, const Launch& launch) {
  run_kernel(add_bias_rows, rows_by_columns(y.rows, y.cols), dim3{kRowThreads}, 0, launch.stream, bias, y);
}

void move(Matrix<const Bf16> from, Matrix<Bf16> to, const Launch& launch) {
  const bool wide = from.cols % 8 == 0 && is_wide(from.data, from.stride) && is_wide(to.data, to.stride);
  const dim3 grid = rows_by_columns(from.rows, wide ? from.cols / 8 : from.cols);
  run_kernel(move_rows, grid, dim3{kRowThreads}, 0, launch.stream, from, to, wide);
}

void load_rows_kernels() {
  load_kernel(embed_rows);
  load_kernel(normalise_rows);
  load_kernel(combine_rows);
  load_kernel(add_bias_rows);
  load_kernel(move_rows);
}

}  // namespace moed::cuda
