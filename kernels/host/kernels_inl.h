#pragma once

#include <cstdint>

#include "kernels/host/kernel_table.h"

namespace moed {

// Every inner loop, once, over a vector type V that each ISA's file defines. V is a type of that file alone, so no two
// files instantiate the same symbol.
//
// V: kLanes floats an F; 2 * kLanes bf16 a P. dot(acc, a, b) adds the products of even and odd neighbours to each lane.
// sum(F) adds lane i to lane i + half, halving down to one; sums() does the same for many.
template <class V>
struct Kernels {
  using F = typename V::F;
  using P = typename V::P;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kPairs = 2 * kLanes;
  // Up to here memory sets the pace of a product.
  static constexpr int32_t kFewRows = 48;
  static constexpr int64_t kTileElementsMax = 6144;
  static constexpr int64_t kRowAheadElements = 1024;

  static const KernelTable& table() {
    static constexpr KernelTable kTable = {&dot_block, &attention_chunk, &attention_merge, &divide_to_bf16,
                                           &rope_head, &silu_mul,        &sum_squares,     &scale_to_bf16,
                                           &to_float,  &add_scaled,      &exp_shifted};
    return kTable;
  }

  // ---- products

  // kAhead: the weights of the tile that follows are asked for, since memory and not the arithmetic sets the pace.
  template <int M, int N, bool kAhead>
  static void dot_tile(const Bf16* const* x, const Bf16* w, int32_t k, float* sums) {
    F acc[M * N];
    for (int i = 0; i < M * N; ++i) acc[i] = V::zero();
    // The same place in the next tile, or, when two tiles would crowd L1, further on in the same rows.
    [[maybe_unused]] const int64_t ahead = int64_t{N} * k <= kTileElementsMax ? int64_t{N} * k : kRowAheadElements;
    int32_t at = 0;
    for (; at + kPairs <= k; at += kPairs) {
      P ws[N];
      for (int n = 0; n < N; ++n) {
        ws[n] = V::load_pairs(w + int64_t{n} * k + at);
        if constexpr (kAhead) V::prefetch(w + int64_t{n} * k + at + ahead);
      }
      for (int m = 0; m < M; ++m) {
        const P xs = V::load_pairs(x[m] + at);
        for (int n = 0; n < N; ++n) acc[m * N + n] = V::dot(acc[m * N + n], xs, ws[n]);
      }
    }
    if (at < k) {
      for (int n = 0; n < N; ++n) {
        const P tail = V::load_pairs(w + int64_t{n} * k + at, k - at);
        for (int m = 0; m < M; ++m) acc[m * N + n] = V::dot(acc[m * N + n], V::load_pairs(x[m] + at, k - at), tail);
      }
    }
    V::template sums<M * N>(acc, sums);
  }

  template <int M, int N, bool kAhead>
  static void dot_tile_to(const DotBlock& block, int32_t row, int32_t column) {
    float sums[M * N];
    dot_tile<M, N, kAhead>(block.x + row, block.w + int64_t{column} * block.k, block.k, sums);
    for (int m = 0; m < M; ++m) {
      float* y = block.y[row + m] + block.y_begin + column;
      if (block.bias != nullptr) {
        for (int n = 0; n < N; ++n) sums[m * N + n] += block.bias[column + n];
      }
      if (block.accumulate) {
        for (int n = 0; n < N; ++n) sums[m * N + n] += y[n];
      }
      for (int n = 0; n < N; ++n) y[n] = sums[m * N + n];
    }
  }

  template <int M, bool kAhead>
  static void dot_columns(const DotBlock& block, int32_t row, int32_t column, int32_t end) {
    constexpr int kColumns = V::tile_columns(M);
    for (; column + kColumns <= end; column += kColumns) dot_tile_to<M, kColumns, kAhead>(block, row, column);
    for (; column < end; ++column) dot_tile_to<M, 1, kAhead>(block, row, column);
  }

  // rows in [1, M] from `row` against columns [column, end).
  template <int M, bool kAhead>
  static void dot_rows(const DotBlock& block, int32_t row, int32_t rows, int32_t column, int32_t end) {
    if (rows == M) {
      dot_columns<M, kAhead>(block, row, column, end);
    } else if constexpr (M > 1) {
      dot_rows<M - 1, kAhead>(block, row, rows, column, end);
    }
  }

  // All rows against columns [column, end), in tiles as even as they come: 8 rows are 4 + 4 rather than 6 + 2. The
  // first tile fetches ahead when `cold`.
  static void dot_strip(const DotBlock& block, int32_t column, int32_t end, bool cold) {
    int32_t tiles = (block.m + V::kTileRows - 1) / V::kTileRows;
    for (int32_t row = 0; tiles > 0; --tiles) {
      const int32_t rows = (block.m - row + tiles - 1) / tiles;
      if (cold && row == 0) {
        dot_rows<V::kTileRows, true>(block, row, rows, column, end);
      } else {
        dot_rows<V::kTileRows, false>(block, row, rows, column, end);
      }
      row += rows;
    }
  }

  static void dot_block(const DotBlock& block) {
    if (block.m <= V::kTileRows || block.m > kFewRows) return dot_strip(block, 0, block.n, block.m <= kFewRows);
    // A few tiles of rows: strips of weights narrow enough for L1 pass all rows while the next strip comes from memory.
    constexpr int kStrip = V::tile_columns(V::kTileRows);
    for (int32_t column = 0; column < block.n; column += kStrip) {
      const int32_t end = column + kStrip < block.n ? column + kStrip : block.n;
      dot_strip(block, column, end, true);
    }
  }

  // ---- exp

  // Relative error below 2e-7; 0 below -87, clamped above 88.
  static F exp(F x) {
    const F floor = V::set1(-87.0F);
    const F clamped = V::min(V::max(x, floor), V::set1(88.0F));
    const F n = V::round(V::mul(clamped, V::set1(1.44269504F)));
    F r = V::fma(n, V::set1(-0.693359375F), clamped);
    r = V::fma(n, V::set1(2.12194440e-4F), r);
    F p = V::set1(1.0F / 5040.0F);
    p = V::fma(p, r, V::set1(1.0F / 720.0F));
    p = V::fma(p, r, V::set1(1.0F / 120.0F));
    p = V::fma(p, r, V::set1(1.0F / 24.0F));
    p = V::fma(p, r, V::set1(1.0F / 6.0F));
    p = V::fma(p, r, V::set1(0.5F));
    p = V::fma(p, r, V::set1(1.0F));
    p = V::fma(p, r, V::set1(1.0F));
    return V::zero_below(V::mul(p, V::power_of_two(n)), x, floor);
  }

  static float exp(float x) {
    float lanes[kLanes];
    V::store(lanes, exp(V::set1(x)));
    return lanes[0];
  }

  static float exp_shifted(float* x, float shift, int32_t n) {
    F total = V::zero();
    const F shifts = V::set1(shift);
    int32_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const F e = exp(V::sub(V::load(x + i), shifts));
      V::store(x + i, e);
      total = V::add(total, e);
    }
    if (i < n) {
      V::store(x + i, exp(V::sub(V::load(x + i, n - i), shifts)), n - i);
      total = V::add(total, V::load(x + i, n - i));
    }
    return V::sum(total);
  }

  // ---- attention

  template <int R, int C>
  static void score_tile(const AttentionChunk& chunk, int32_t row, int32_t position) {
    F acc[R][C];
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) acc[r][c] = V::zero();
    }
    const uint32_t* k = chunk.transposed_k + position;
    for (int32_t d = 0; d < chunk.head_dim; d += 2, k += kChunkPositions) {
      P ks[C];
      for (int c = 0; c < C; ++c) ks[c] = V::load_words(k + c * kLanes);
      for (int r = 0; r < R; ++r) {
        const P q = V::broadcast_pair(chunk.q[row + r] + d);
        for (int c = 0; c < C; ++c) acc[r][c] = V::dot(acc[r][c], q, ks[c]);
      }
    }
    const F scale = V::set1(chunk.scale);
    for (int r = 0; r < R; ++r) {
      float* scores = chunk.scores + int64_t{row + r} * kChunkPositions + position;
      for (int c = 0; c < C; ++c) V::store(scores + c * kLanes, V::mul(acc[r][c], scale));
    }
  }

  template <int R>
  static void score_rows(const AttentionChunk& chunk, int32_t row) {
    constexpr int kColumns = V::kScoreVectors * kLanes;
    int32_t position = 0;
    for (; position + kColumns <= chunk.visible_max; position += kColumns) {
      score_tile<R, V::kScoreVectors>(chunk, row, position);
    }
    for (; position < chunk.visible_max; position += kLanes) score_tile<R, 1>(chunk, row, position);
  }

  // Scores to weights in place; weights past what the row sees are 0, so that adding them changes nothing.
  static void soften(const AttentionChunk& chunk, int32_t row) {
    float* scores = chunk.scores + int64_t{row} * kChunkPositions;
    const int32_t n = chunk.visible[row];
    float peak = scores[0];
    F peaks = V::set1(peak);
    int32_t i = 0;
    for (; i + kLanes <= n; i += kLanes) peaks = V::max(peaks, V::load(scores + i));
    peak = V::max_lane(peaks);
    for (; i < n; ++i) peak = scores[i] > peak ? scores[i] : peak;
    chunk.out.peak[row] = peak;
    chunk.out.total[row] = exp_shifted(scores, peak, n);
    for (int32_t rest = n; rest < chunk.visible_max; ++rest) scores[rest] = 0.0F;
  }

  template <int R, int C, bool kTail>
  static void value_tile(const AttentionChunk& chunk, int32_t row, int32_t dim) {
    F acc[R][C];
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) acc[r][c] = V::zero();
    }
    const float* weights = chunk.scores + int64_t{row} * kChunkPositions;
    for (int32_t position = 0, block = 0; position < chunk.visible_max; ++block) {
      const Bf16* v = chunk.v[block] + dim;
      const int32_t left = chunk.visible_max - position;
      const int32_t end = position + (left < chunk.block_tokens ? left : chunk.block_tokens);
      for (; position < end; ++position, v += chunk.head_dim) {
        F vs[C];
        for (int c = 0; c < C; ++c) {
          vs[c] = kTail ? V::load_bf16(v + c * kLanes, chunk.head_dim - dim) : V::load_bf16(v + c * kLanes);
        }
        for (int r = 0; r < R; ++r) {
          const F weight = V::set1(weights[r * kChunkPositions + position]);
          for (int c = 0; c < C; ++c) acc[r][c] = V::fma(weight, vs[c], acc[r][c]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      float* sums = chunk.out.sums + int64_t{row + r} * chunk.head_dim + dim;
      for (int c = 0; c < C; ++c) V::store(sums + c * kLanes, acc[r][c], kTail ? chunk.head_dim - dim : kLanes);
    }
  }

  template <int R>
  static void value_rows(const AttentionChunk& chunk, int32_t row) {
    constexpr int kColumns = V::kScoreVectors * kLanes;
    int32_t dim = 0;
    for (; dim + kColumns <= chunk.head_dim; dim += kColumns) value_tile<R, V::kScoreVectors, false>(chunk, row, dim);
    for (; dim + kLanes <= chunk.head_dim; dim += kLanes) value_tile<R, 1, false>(chunk, row, dim);
    if (dim < chunk.head_dim) value_tile<R, 1, true>(chunk, row, dim);
  }

  template <int R>
  static void score_and_value(const AttentionChunk& chunk, int32_t row, bool values) {
    const int32_t left = chunk.vectors - row;
    if (left >= R) {
      values ? value_rows<R>(chunk, row) : score_rows<R>(chunk, row);
    } else if constexpr (R > 1) {
      score_and_value<R - 1>(chunk, row, values);
    }
  }

  static void attention_chunk(const AttentionChunk& chunk) {
    constexpr int kRows = V::kScoreRows;
    for (int32_t position = 0; position < chunk.visible_max; position += 16) {
      const int32_t block = position / chunk.block_tokens;
      const Bf16* k = chunk.k[block] + int64_t{position - block * chunk.block_tokens} * chunk.head_dim;
      V::transpose_words(k, chunk.head_dim, chunk.transposed_k + position);
    }
    for (int32_t row = 0; row < chunk.vectors; row += kRows) score_and_value<kRows>(chunk, row, false);
    for (int32_t row = 0; row < chunk.vectors; ++row) soften(chunk, row);
    for (int32_t row = 0; row < chunk.vectors; row += kRows) score_and_value<kRows>(chunk, row, true);
  }

  static void attention_merge(const AttentionPartial& into, const AttentionPartial& from, int32_t vectors,
                              int32_t head_dim) {
    for (int32_t i = 0; i < vectors; ++i) {
      const float peak = into.peak[i] > from.peak[i] ? into.peak[i] : from.peak[i];
      const float keep = exp(into.peak[i] - peak);
      const float take = exp(from.peak[i] - peak);
      into.peak[i] = peak;
      into.total[i] = into.total[i] * keep + from.total[i] * take;
      float* sums = into.sums + int64_t{i} * head_dim;
      const float* more = from.sums + int64_t{i} * head_dim;
      for (int32_t d = 0; d < head_dim; d += kLanes) {
        const F kept = V::mul(V::load(sums + d, head_dim - d), V::set1(keep));
        V::store(sums + d, V::fma(V::load(more + d, head_dim - d), V::set1(take), kept), head_dim - d);
      }
    }
  }

  // ---- rows

  static void divide_to_bf16(const float* x, float divisor, int32_t n, Bf16* out) {
    const F divisors = V::set1(divisor);
    for (int32_t i = 0; i < n; i += kLanes) V::store_bf16(out + i, V::div(V::load(x + i, n - i), divisors), n - i);
  }

  static void rope_head(const RopeHead& head) {
    const int32_t n = head.head_dim;
    const F low = V::set1(-head.clip);
    const F high = V::set1(head.clip);
    for (int32_t i = 0; i < n; i += kLanes) {
      F x = V::load(head.x + i, n - i);
      if (head.norm != nullptr) {
        x = V::mul(V::mul(x, V::set1(head.inverse_rms)), V::load(head.norm + i, n - i));
      }
      V::store(head.scratch + i, V::min(V::max(x, low), high), n - i);
    }
    const int32_t half = head.rotary_dim / 2;
    for (int32_t i = 0; i < half; i += kLanes) {
      const int32_t left = half - i;
      const F cosine = V::load(head.cos_sin + i, left);
      const F sine = V::load(head.cos_sin + half + i, left);
      const F a = V::load(head.scratch + i, left);
      const F b = V::load(head.scratch + half + i, left);
      V::store(head.scratch + i, V::sub(V::mul(a, cosine), V::mul(b, sine)), left);
      V::store(head.scratch + half + i, V::add(V::mul(b, cosine), V::mul(a, sine)), left);
    }
    for (int32_t i = 0; i < n; i += kLanes) V::store_bf16(head.out + i, V::load(head.scratch + i, n - i), n - i);
  }

  static void silu_mul(const float* gate, const float* up, int32_t n, Bf16* out) {
    const F one = V::set1(1.0F);
    for (int32_t i = 0; i < n; i += kLanes) {
      const F g = V::load(gate + i, n - i);
      const F silu = V::div(g, V::add(one, exp(V::sub(V::zero(), g))));
      V::store_bf16(out + i, V::mul(silu, V::load(up + i, n - i)), n - i);
    }
  }

  static float sum_squares(const float* x, int32_t n) {
    F total = V::zero();
    for (int32_t i = 0; i < n; i += kLanes) {
      const F v = V::load(x + i, n - i);
      total = V::fma(v, v, total);
    }
    return V::sum(total);
  }

  static void scale_to_bf16(const float* x, float factor, const float* weight, int32_t n, Bf16* out) {
    const F factors = V::set1(factor);
    for (int32_t i = 0; i < n; i += kLanes) {
      const F scaled = V::mul(V::load(x + i, n - i), factors);
      V::store_bf16(out + i, V::mul(scaled, V::load(weight + i, n - i)), n - i);
    }
  }

  static void to_float(const Bf16* x, int32_t n, float* out) {
    for (int32_t i = 0; i < n; i += kLanes) V::store(out + i, V::load_bf16(x + i, n - i), n - i);
  }

  static void add_scaled(const float* x, float factor, int32_t n, float* y) {
    const F factors = V::set1(factor);
    for (int32_t i = 0; i < n; i += kLanes) {
      V::store(y + i, V::fma(V::load(x + i, n - i), factors, V::load(y + i, n - i)), n - i);
    }
  }
};

}  // namespace moed
