#pragma once

#include "base/bf16.h"
#include "cuda_port.cuh"
#include "kernels/cuda/reduce.cuh"

// Products of some rows of x with two panels of rows of W: gate and up, or two neighbours of one matrix. All of a block
// takes part. Sums run over K in an order that depends on K alone, but not in the same one in both ways.
namespace moed::cuda {

constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / kWarpSize;
constexpr int kPanelColumns = 64;
constexpr int kTileRows = 64;
// Up to here one read of the weights by dot products costs less than a tile, and the tensor cores idle anyway.
constexpr int kDotRows = 4;
// Up to here a tile of 16 rows.
constexpr int kSmallTileRows = 16;

constexpr int kTileDepth = 32;  // of K, a stage
constexpr int kStages = 3;
// Rows of a stage, 80 bytes apart: eight of them meet 32 different banks, whether written or read as matrices.
constexpr int kStageStride = kTileDepth + 8;
constexpr int kStageElements = (kTileRows + 2 * kPanelColumns) * kStageStride;

// Rows of W, K contiguous; fewer than kPanelColumns at the edge, none beyond it.
struct Panel {
  const Bf16* weights;
  int32_t columns;
};

struct TileShape {
  int32_t rows;   // of x
  int32_t depth;  // K
  bool wide;      // rows of x and W are whole multiples of 16 bytes and begin at such
  bool tiles;     // whatever the number of rows, so that a row's bits do not depend on it
};

// ---- tensor cores

// Eight elements of a row from k on to shared memory, zeros past the depth or without a row.
__device__ inline void stage_chunk(uint16_t* to, const Bf16* row, int32_t k, const TileShape& shape) {
  if (shape.wide) {
    const bool there = row != nullptr && k < shape.depth;
    copy_async_16(to, there ? row + k : nullptr, there ? 16 : 0);
    return;
  }
  for (int i = 0; i < 8; ++i) to[i] = row != nullptr && k + i < shape.depth ? row[k + i].bits : uint16_t{0};
}

// What one thread brings to each stage: a chunk of a row of x and of each panel.
struct StageRows {
  const Bf16* x;
  const Bf16* first;
  const Bf16* second;
};

template <int kRows>
__device__ inline void fill_stage(uint16_t* stage, const StageRows& rows, int32_t step, const TileShape& shape) {
  const int row = static_cast<int>(threadIdx.x) / 4;
  const int chunk = static_cast<int>(threadIdx.x) % 4 * 8;
  const int32_t k = step * kTileDepth + chunk;
  uint16_t* to = stage + row * kStageStride + chunk;
  if (row < kRows) stage_chunk(to, rows.x, k, shape);
  stage_chunk(to + kTileRows * kStageStride, rows.first, k, shape);
  stage_chunk(to + (kTileRows + kPanelColumns) * kStageStride, rows.second, k, shape);
}

// How the eight warps share a tile of kRows: warp w holds kRowTiles x 2 * kColumnTiles products of 16 x 8.
template <int kRows>
struct WarpTile {
  static constexpr int kRowTiles = kRows == kTileRows ? 2 : 1;
  static constexpr int kColumnTiles = kRows == kTileRows ? 2 : 1;  // of each panel
  static constexpr int kWarpsAcross = kPanelColumns / (8 * kColumnTiles);
  static_assert(kWarpsAcross * (kRows / (16 * kRowTiles)) == kTileWarps);

  int first_row = warp_of_thread() / kWarpsAcross * kRowTiles * 16;
  int first_column = warp_of_thread() % kWarpsAcross * kColumnTiles * 8;
  float sums[2 * kColumnTiles][kRowTiles][4] = {};
};

template <int kRows>
__device__ inline void add_stage(const uint16_t* stage, WarpTile<kRows>& tile) {
  using Tile = WarpTile<kRows>;
  const int lane = lane_of_thread();
#pragma unroll
  for (int k = 0; k < kTileDepth; k += 16) {
    uint32_t x[Tile::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
      load_matrices(x[i], stage + (tile.first_row + i * 16 + lane % 16) * kStageStride + k + lane / 16 * 8);
    }
#pragma unroll
    for (int j = 0; j < 2 * Tile::kColumnTiles; j += 2) {
      // Two tiles of columns at once: lanes 0..15 name rows of the first, the others of the second.
      const int mine = j + lane / 16;
      const int row = kTileRows + mine / Tile::kColumnTiles * kPanelColumns + tile.first_column +
                      mine % Tile::kColumnTiles * 8 + lane % 8;
      uint32_t w[4];
      load_matrices(w, stage + row * kStageStride + k + lane / 8 % 2 * 8);
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        mma_m16n8k16(tile.sums[j][i], x[i], {w[0], w[1]});
        mma_m16n8k16(tile.sums[j + 1][i], x[i], {w[2], w[3]});
      }
    }
  }
}

// store(row, column, first, second) once for each row below shape.rows and each column of a panel; `column` may lie
// past the columns of either. row_of(row): where a row of x begins.
template <int kRows, class RowOf, class Store>
__device__ inline void multiply_tile(uint16_t* stages, const TileShape& shape, const Panel& first, const Panel& second,
                                     const RowOf& row_of, const Store& store) {
  const int row = static_cast<int>(threadIdx.x) / 4;
  const StageRows rows{row < shape.rows && row < kRows ? row_of(row) : nullptr,
                       row < first.columns ? first.weights + int64_t{row} * shape.depth : nullptr,
                       row < second.columns ? second.weights + int64_t{row} * shape.depth : nullptr};
  const auto steps = static_cast<int32_t>(divide_up(shape.depth, kTileDepth));
  WarpTile<kRows> tile;
  for (int32_t step = 0; step < kStages - 1; ++step) {
    if (step < steps) fill_stage<kRows>(stages + step * kStageElements, rows, step, shape);
    copy_async_commit();
  }
  for (int32_t step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    // This step's stage is there for all, and all have done with the last step's, which is filled next.
    __syncthreads();
    const int32_t ahead = step + kStages - 1;
    if (ahead < steps) fill_stage<kRows>(stages + ahead % kStages * kStageElements, rows, ahead, shape);
    copy_async_commit();
    add_stage<kRows>(stages + step % kStages * kStageElements, tile);
  }
  using Tile = WarpTile<kRows>;
  const int lane = lane_of_thread();
#pragma unroll
  for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int to_row = tile.first_row + i * 16 + lane / 4 + part / 2 * 8;
        const int to_column = tile.first_column + j * 8 + lane % 4 * 2 + part % 2;
        if (to_row < shape.rows) {
          store(to_row, to_column, tile.sums[j][i][part], tile.sums[Tile::kColumnTiles + j][i][part]);
        }
      }
    }
  }
}

// ---- dot products

__device__ inline void split_pair(uint32_t word, float& low, float& high) {
  low = from_bf16(static_cast<uint16_t>(word & 0xffffU));
  high = from_bf16(static_cast<uint16_t>(word >> 16));
}

__device__ inline float dot_8(const uint4& a, const uint4& b, float sum) {
  const uint32_t as[4] = {a.x, a.y, a.z, a.w};
  const uint32_t bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float a_low;
    float a_high;
    float b_low;
    float b_high;
    split_pair(as[i], a_low, a_high);
    split_pair(bs[i], b_low, b_high);
    sum = fmaf(a_high, b_high, fmaf(a_low, b_low, sum));
  }
  return sum;
}

// sums[panel][row] of one lane's share of K, for one row of W a panel; a null one counts nothing.
__device__ inline void add_dots(const Bf16* const (&w)[2], const Bf16* const (&x)[kDotRows], const TileShape& shape,
                                float (&sums)[2][kDotRows]) {
  const int lane = lane_of_thread();
  if (shape.wide) {
#pragma unroll 2
    for (int32_t k = lane * 8; k < shape.depth; k += kWarpSize * 8) {
      const uint4 zero = {0, 0, 0, 0};
      const uint4 ws[2] = {w[0] != nullptr ? load_16_streamed(w[0] + k) : zero,
                           w[1] != nullptr ? load_16_streamed(w[1] + k) : zero};
#pragma unroll
      for (int row = 0; row < kDotRows; ++row) {
        if (row >= shape.rows) continue;
        const uint4 xs = load_16(x[row] + k);
        sums[0][row] = dot_8(ws[0], xs, sums[0][row]);
        sums[1][row] = dot_8(ws[1], xs, sums[1][row]);
      }
    }
    return;
  }
  for (int32_t k = lane; k < shape.depth; k += kWarpSize) {
#pragma unroll
    for (int row = 0; row < kDotRows; ++row) {
      if (row >= shape.rows) continue;
      const float value = from_bf16(x[row][k].bits);
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        if (w[panel] != nullptr) sums[panel][row] = fmaf(from_bf16(w[panel][k].bits), value, sums[panel][row]);
      }
    }
  }
}

// As multiply_tile, for at most kDotRows rows: a warp a column, the columns dealt to the blocks along z.
template <class RowOf, class Store>
__device__ inline void multiply_dots(const TileShape& shape, const Panel& first, const Panel& second,
                                     const RowOf& row_of, const Store& store) {
  const Bf16* x[kDotRows];
#pragma unroll
  for (int row = 0; row < kDotRows; ++row) x[row] = row < shape.rows ? row_of(row) : nullptr;
  const int warp = static_cast<int>(blockIdx.z) * kTileWarps + warp_of_thread();
  const int num_warps = static_cast<int>(gridDim.z) * kTileWarps;
  for (int column = warp; column < max(first.columns, second.columns); column += num_warps) {
    const Bf16* w[2] = {column < first.columns ? first.weights + int64_t{column} * shape.depth : nullptr,
                        column < second.columns ? second.weights + int64_t{column} * shape.depth : nullptr};
    float sums[2][kDotRows] = {};
    add_dots(w, x, shape, sums);
#pragma unroll
    for (int row = 0; row < kDotRows; ++row) {
      if (row >= shape.rows) continue;
      const float first_sum = warp_sum(sums[0][row]);
      const float second_sum = warp_sum(sums[1][row]);
      if (lane_of_thread() == row) store(row, column, first_sum, second_sum);
    }
  }
}

// The way that the number of rows asks for.
template <class RowOf, class Store>
__device__ inline void multiply(uint16_t* stages, const TileShape& shape, const Panel& first, const Panel& second,
                                const RowOf& row_of, const Store& store) {
  if (shape.rows <= kDotRows && !shape.tiles) {
    multiply_dots(shape, first, second, row_of, store);
  } else if (blockIdx.z > 0) {
    return;
  } else if (shape.rows <= kSmallTileRows) {
    multiply_tile<kSmallTileRows>(stages, shape, first, second, row_of, store);
  } else {
    multiply_tile<kTileRows>(stages, shape, first, second, row_of, store);
  }
}

}  // namespace moed::cuda
