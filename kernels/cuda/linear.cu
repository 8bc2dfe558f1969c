#include "kernels/cuda/linear.cuh"

#include "kernels/cuda/tile.cuh"

namespace moed::cuda {
namespace {

constexpr int kLinearColumns = 2 * kPanelColumns;

struct LinearArgs {
  Matrix<const Bf16> x;
  LinearWeights weights;
  bool accumulate;
  Matrix<float> y;
  bool wide;
};

__device__ inline void store_sum(const LinearArgs& args, int64_t row, int32_t column, float sum) {
  if (column >= args.weights.out) return;
  float* to = args.y.data + row * args.y.stride + column;
  if (args.weights.bias != nullptr) sum += args.weights.bias[column];
  *to = args.accumulate ? *to + sum : sum;
}

__device__ inline Panel panel_at(const LinearArgs& args, int32_t column, int32_t columns_max) {
  const int32_t left = max(args.weights.out - column, 0);
  return {args.weights.weight + int64_t{min(column, args.weights.out)} * args.weights.in, min(left, columns_max)};
}

// Rows in tiles, columns in pairs of panels.
__global__ void __launch_bounds__(kTileThreads) multiply_linear_tiles(LinearArgs args) {
  MOED_SHARED(uint16_t, stages, kStages * kStageElements);
  const int64_t first_row = int64_t{blockIdx.x} * kTileRows;
  const int32_t column = static_cast<int32_t>(blockIdx.y) * kLinearColumns;
  const auto row_of = [&](int row) { return args.x.data + (first_row + row) * args.x.stride; };
  const auto store = [&](int row, int to, float first, float second) {
    // A panel is as wide as the tile: what lies past its 64 columns belongs to nobody.
    store_sum(args, first_row + row, column + to, first);
    store_sum(args, first_row + row, column + kPanelColumns + to, second);
  };
  const TileShape shape{min(args.x.rows - static_cast<int32_t>(first_row), kTileRows), args.weights.in, args.wide,
                        true};
  multiply(stages, shape, panel_at(args, column, kPanelColumns), panel_at(args, column + kPanelColumns, kPanelColumns),
           row_of, store);
}

// A warp a column, kDotRows rows: more blocks than tiles would be.
__global__ void __launch_bounds__(kTileThreads) multiply_linear_dots(LinearArgs args) {
  const int64_t first_row = int64_t{blockIdx.x} * kDotRows;
  const int32_t column = static_cast<int32_t>(blockIdx.y) * kTileWarps;
  const auto row_of = [&](int row) { return args.x.data + (first_row + row) * args.x.stride; };
  const auto store = [&](int row, int to, float sum, float) { store_sum(args, first_row + row, column + to, sum); };
  const TileShape shape{min(args.x.rows - static_cast<int32_t>(first_row), kDotRows), args.weights.in, args.wide,
                        false};
  multiply_dots(shape, panel_at(args, column, kTileWarps), {nullptr, 0}, row_of, store);
}

LinearArgs arguments(Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate, Matrix<float> y) {
  return {x, weights, accumulate, y,
          weights.in % 8 == 0 && rows_are_wide(x.data, x.stride) && rows_are_wide(weights.weight, weights.in)};
}

}  // namespace

void linear_dots(Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate, Matrix<float> y,
                 const Launch& launch) {
  const dim3 grid{static_cast<unsigned>(divide_up(x.rows, kDotRows)),
                  static_cast<unsigned>(divide_up(weights.out, kTileWarps))};
  run_kernel(multiply_linear_dots, grid, dim3{kTileThreads}, 0, launch.stream, arguments(x, weights, accumulate, y));
}

void linear(Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate, Matrix<float> y,
            const Launch& launch) {
  if (x.rows <= kDotRows && !launch.deterministic) return linear_dots(x, weights, accumulate, y, launch);
  const dim3 grid{static_cast<unsigned>(divide_up(x.rows, kTileRows)),
                  static_cast<unsigned>(divide_up(weights.out, kLinearColumns))};
  run_kernel(multiply_linear_tiles, grid, dim3{kTileThreads}, 0, launch.stream, arguments(x, weights, accumulate, y));
}

void load_linear_kernels() {
  load_kernel(multiply_linear_tiles);
  load_kernel(multiply_linear_dots);
}

}  // namespace moed::cuda
