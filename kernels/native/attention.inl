// Softmax attention with a gate, keys in blocks with a running maximum. Included once an instruction set.
//
// Keys and values are packed once; a task is some query rows of one kv head, all its query heads flattened, so that a
// key tile in the first cache serves them all.
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bf16.inl"
#include "ops.h"
#include "vector.inl"

namespace {

using horsepower::Attention;

constexpr int64_t TASK_ROWS = 8 * TILE_ROWS;
constexpr int64_t BLOCK_KEYS = 512, BLOCK_TILES = BLOCK_KEYS / TILE_WIDTH;
constexpr int64_t SUM_UNITS = 128;  // of values summed at once: they stay in the first cache
constexpr int64_t SCORE_PITCH = BLOCK_KEYS + 16;  // a power of two would put all rows into the same cache sets

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Where things lie in the workspace, in 32-bit units; all at multiples of 64 bytes.
template <typename Units>
struct Layout {
  int64_t units, width;         // of a head dim that is summed over, and of one that is not
  int64_t keys, values;         // of one kv head: [key tile][units][TILE_WIDTH]; [key / DEPTH][width]
  int64_t query, scores, out, edge, row_state, thread;  // of one thread

  explicit Layout(const Attention& a) {
    units = (a.dim + Units::DEPTH - 1) / Units::DEPTH;
    width = round_up(a.dim, LANES);
    const int64_t rows = round_up(a.keys, TILE_WIDTH);
    keys = round_up(rows * units, 16);
    values = round_up(rows / Units::DEPTH * width, 16);
    query = 0;
    scores = query + round_up(TASK_ROWS * units, 16);
    out = scores + TASK_ROWS * SCORE_PITCH;
    edge = out + round_up(TASK_ROWS * width, 16);
    row_state = edge + round_up(width, 16);
    thread = row_state + 2 * TASK_ROWS;
  }

  int64_t total(const Attention& a) const { return a.kv_heads * (keys + values) + a.threads * round_up(thread, 16); }
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Units of one row along the head dim, `step` apart in `to`.
inline void pack_row(FloatUnits, const float* from, int64_t dim, uint32_t* to, int64_t step) {
  for (int64_t d = 0; d < dim; ++d) to[d * step] = bits_of(from[d]);
}

inline void pack_row(FloatUnits, const uint16_t* from, int64_t dim, uint32_t* to, int64_t step) {
  for (int64_t d = 0; d < dim; ++d) to[d * step] = static_cast<uint32_t>(from[d]) << 16;
}

// Units across `count` (at least 1) rows at from, from + pitch...: one for each place of the head dim.
inline void pack_across(FloatUnits, const float* from, int64_t, int64_t, int64_t dim, uint32_t* to) {
  for (int64_t d = 0; d < dim; ++d) to[d] = bits_of(from[d]);
}

inline void pack_across(FloatUnits, const uint16_t* from, int64_t, int64_t, int64_t dim, uint32_t* to) {
  for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<uint32_t>(from[d]) << 16;
}

#if defined(__AVX512BF16__)
inline void pack_row(PairUnits, const uint16_t* from, int64_t dim, uint32_t* to, int64_t step) {
  for (int64_t d = 0; d < dim / 2; ++d) __builtin_memcpy(to + d * step, from + 2 * d, sizeof *to);
  if (dim % 2) to[dim / 2 * step] = from[dim - 1];
}

inline void pack_across(PairUnits, const uint16_t* from, int64_t pitch, int64_t count, int64_t dim, uint32_t* to) {
  if (count == 1) {
    for (int64_t d = 0; d < dim; ++d) to[d] = from[d];
    return;
  }
  const uint16_t* next = from + pitch;
  for (int64_t d = 0; d < dim; ++d) to[d] = from[d] | static_cast<uint32_t>(next[d]) << 16;
}
#endif

inline void clear(uint32_t* from, uint32_t* to) {
  for (; from < to; ++from) *from = 0;
}

// One tile of keys and the values of the same rows; what lies beyond the last row or the head dim is zero.
template <typename Units, typename T>
void pack_keys(const Attention& a, const Layout<Units>& at, int64_t head, int64_t tile, uint32_t* keys,
               uint32_t* values) {
  const int64_t first = tile * TILE_WIDTH;
  const int64_t rows = a.keys - first < TILE_WIDTH ? a.keys - first : TILE_WIDTH;
  const T* k = static_cast<const T*>(a.k) + head * a.k_head + first * a.k_pitch;
  const T* v = static_cast<const T*>(a.v) + head * a.v_head + first * a.v_pitch;
  keys += tile * TILE_WIDTH * at.units;
  values += first / Units::DEPTH * at.width;
  if (rows < TILE_WIDTH) clear(keys, keys + TILE_WIDTH * at.units);
  for (int64_t j = 0; j < rows; ++j) pack_row(Units{}, k + j * a.k_pitch, a.dim, keys + j, TILE_WIDTH);
  for (int64_t j = 0; j < TILE_WIDTH; j += Units::DEPTH, values += at.width) {
    const int64_t filled = j < rows ? a.dim : 0;
    if (filled) pack_across(Units{}, v + j * a.v_pitch, a.v_pitch, rows - j, a.dim, values);
    clear(values + filled, values + at.width);
  }
}

struct KeyTile {
  int64_t index;
  int64_t first, last;  // the part of it that is seen
};

// The next tiles of `keys` (two ranges, from `part` and `key` on); returns how many.
inline int64_t next_tiles(const int64_t* keys, int64_t& part, int64_t& key, KeyTile* tiles) {
  int64_t count = 0;
  while (part < 2 && count < BLOCK_TILES) {
    const int64_t start = key < keys[2 * part] ? keys[2 * part] : key, end = keys[2 * part + 1];
    if (start >= end) {
      ++part;
      key = 0;
      continue;
    }
    const int64_t index = start / TILE_WIDTH, origin = index * TILE_WIDTH;
    tiles[count++] = {index, start - origin, end - origin < TILE_WIDTH ? end - origin : TILE_WIDTH};
    key = origin + TILE_WIDTH;
  }
  return count;
}

template <typename Units>
void score(const uint32_t* query, const uint32_t* keys, int64_t units, const KeyTile* tiles, int64_t count,
           int64_t rows, float* scores) {
  for (int64_t t = 0; t < count; ++t, scores += TILE_WIDTH) {
    const uint32_t* tile = keys + tiles[t].index * TILE_WIDTH * units;
    for (int64_t r = 0; r < rows; r += TILE_ROWS)
      multiply_tile<Units, TILE_VECTORS>(query + r * units, units, tile, TILE_WIDTH, units, scores + r * SCORE_PITCH,
                                         SCORE_PITCH, false);
    if (tiles[t].first == 0 && tiles[t].last == TILE_WIDTH) continue;
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + r * SCORE_PITCH;
      for (int64_t j = 0; j < tiles[t].first; ++j) row[j] = -__builtin_inff();
      for (int64_t j = tiles[t].last; j < TILE_WIDTH; ++j) row[j] = -__builtin_inff();
    }
  }
}

// Scores to weights, in place; `out` is rescaled when the maximum grows.
// The difference is taken before the scaling: a rounded product would not cancel for huge scores.
template <typename Units>
inline void weigh(float* scores, int64_t count, float scale, float& maximum, float& total, float* out, int64_t width) {
  Floats high[2] = {broadcast(maximum), broadcast(maximum)};
  for (int64_t i = 0; i < count; i += 2 * LANES) {
    high[0] = larger(load(scores + i), high[0]);
    high[1] = larger(load(scores + i + LANES), high[1]);
  }
  const float next = largest(larger(high[0], high[1]));
  if (next != maximum) {
    const Floats shrink = exp2_of_negative<6>(broadcast((maximum - next) * scale));
    total *= shrink[0];
    for (int64_t i = 0; i < width; i += LANES) store(load(out + i) * shrink, out + i);
    maximum = next;
  }
  const Floats m = broadcast(next), c = broadcast(scale);
  Floats sums[2] = {};
  uint32_t* weights = reinterpret_cast<uint32_t*>(scores);
  for (int64_t i = 0; i < count; i += 2 * LANES) {
    const Floats first = exp2_of_negative<Units::EXP_TERMS>((load(scores + i) - m) * c);
    const Floats second = exp2_of_negative<Units::EXP_TERMS>((load(scores + i + LANES) - m) * c);
    sums[0] += first;
    sums[1] += second;
    weights += Units::pack(first, second, weights);
  }
  total += sum(sums[0] + sums[1]);
}

// out[rows, width] += weights[rows, units] values[units, width]
template <typename Units>
void add_values(const uint32_t* weights, const uint32_t* values, int64_t units, int64_t rows, float* out,
                int64_t width) {
  for (; units > SUM_UNITS; units -= SUM_UNITS, weights += SUM_UNITS, values += SUM_UNITS * width)
    add_values<Units>(weights, values, SUM_UNITS, rows, out, width);
  for (int64_t d = 0; d < width; d += TILE_WIDTH) {
    const int64_t vectors = (width - d) / LANES;
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      const auto tile = vectors == 1   ? multiply_tile<Units, 1>
                        : vectors == 2 ? multiply_tile<Units, 2>
                        : vectors == 3 ? multiply_tile<Units, TILE_VECTORS < 3 ? 2 : 3>
                                       : multiply_tile<Units, TILE_VECTORS>;
      tile(weights + r * SCORE_PITCH, SCORE_PITCH, values + d, width, units, out + r * width + d, width, true);
    }
  }
}

// The same for runs of adjacent tiles. A pair with one unseen key is taken apart: 0 x NaN would not be 0.
template <typename Units>
void add_seen_values(const uint32_t* weights, const uint32_t* values, const KeyTile* tiles, int64_t count,
                     int64_t rows, float* out, int64_t width, uint32_t* edge) {
  const auto add_half = [&](int64_t at, const uint32_t* pair, uint32_t mask) {
    for (int64_t d = 0; d < width; ++d) edge[d] = pair[d] & mask;
    add_values<Units>(weights + at, edge, 1, rows, out, width);
  };
  for (int64_t t = 0, end; t < count; t = end) {
    for (end = t + 1; end < count && tiles[end].index == tiles[end - 1].index + 1 && tiles[end].first == 0 &&
                      tiles[end - 1].last == TILE_WIDTH;)
      ++end;
    const uint32_t* run = values + tiles[t].index * TILE_WIDTH / Units::DEPTH * width;
    const int64_t at = t * TILE_WIDTH / Units::DEPTH;
    const int64_t first = tiles[t].first, last = (end - 1 - t) * TILE_WIDTH + tiles[end - 1].last;
    const int64_t from = (first + Units::DEPTH - 1) / Units::DEPTH, to = last / Units::DEPTH;
    if (first % Units::DEPTH) add_half(at + from - 1, run + (from - 1) * width, 0xffff0000);
    if (to > from) add_values<Units>(weights + at + from, run + from * width, to - from, rows, out, width);
    if (last % Units::DEPTH) add_half(at + to, run + to * width, 0x0000ffff);
  }
}

inline float gate_of(const Attention& a, int64_t row, int64_t head) {
  if (!a.gate) return 1.0f;
  const int64_t expert = (row >= a.first_rows[0]) + (row >= a.first_rows[1]);
  const int64_t at = row * a.gate_pitch + expert * a.heads + head;
  const float x =
      a.gate_bf16 ? widen(static_cast<const uint16_t*>(a.gate)[at]) : static_cast<const float*>(a.gate)[at];
  return 1.0f / (1.0f + __builtin_expf(-x));
}

// `rows` flattened (token, query head of this kv head) rows from `first` on, of the tokens of one range.
template <typename Units, typename T>
void attend(const Attention& a, const Layout<Units>& at, const int64_t* range, int64_t kv_head, int64_t first,
            int64_t rows, const uint32_t* keys, const uint32_t* values, uint32_t* scratch) {
  uint32_t* query = scratch + at.query;
  float* scores = reinterpret_cast<float*>(scratch + at.scores);
  float* out = reinterpret_cast<float*>(scratch + at.out);
  float* maximum = reinterpret_cast<float*>(scratch + at.row_state);
  float* total = maximum + TASK_ROWS;
  const int64_t group = a.heads / a.kv_heads, padded = round_up(rows, TILE_ROWS);
  const float scale = 1.44269504f / __builtin_sqrtf(static_cast<float>(a.dim));

  for (int64_t r = 0; r < padded; ++r) {
    const int64_t token = range[0] + (first + r) / group, head = kv_head * group + (first + r) % group;
    const T* q = static_cast<const T*>(a.q) + token * a.q_pitch + head * a.q_head;
    if (r < rows)
      pack_row(Units{}, q, a.dim, query + r * at.units, 1);
    else
      clear(query + r * at.units, query + (r + 1) * at.units);
    maximum[r] = -3.402823466e38f;  // not infinite: a difference of infinities is NaN
    total[r] = 0;
  }
  clear(scratch + at.out, scratch + at.out + padded * at.width);

  KeyTile tiles[BLOCK_TILES];
  int64_t part = 0, key = 0;
  while (const int64_t count = next_tiles(range + 2, part, key, tiles)) {
    score<Units>(query, keys, at.units, tiles, count, padded, scores);
    for (int64_t r = 0; r < padded; ++r)
      weigh<Units>(scores + r * SCORE_PITCH, count * TILE_WIDTH, scale, maximum[r], total[r], out + r * at.width,
                   at.width);
    add_seen_values<Units>(scratch + at.scores, values, tiles, count, padded, out, at.width, scratch + at.edge);
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = range[0] + (first + r) / group, head = kv_head * group + (first + r) % group;
    const float factor = gate_of(a, token, head) / total[r];
    T* to = static_cast<T*>(a.out) + (token * a.heads + head) * a.dim;
    for (int64_t d = 0; d < a.dim; ++d) narrow(out[r * at.width + d] * factor, to + d);
  }
}

inline int64_t tasks_of(const Attention& a, const int64_t* range) {
  return ((range[1] - range[0]) * (a.heads / a.kv_heads) + TASK_ROWS - 1) / TASK_ROWS;
}

template <typename Units, typename T>
void attention_in(const Attention& a) {
  const Layout<Units> at(a);
  uint32_t* keys = static_cast<uint32_t*>(a.workspace);
  uint32_t* values = keys + a.kv_heads * at.keys;
  uint32_t* scratch = values + a.kv_heads * at.values;
  const int64_t tiles = (a.keys + TILE_WIDTH - 1) / TILE_WIDTH;
  int64_t tasks = 0;
  for (int64_t i = 0; i < a.range_count; ++i) tasks += tasks_of(a, a.ranges + 6 * i);

#pragma omp parallel num_threads(a.threads)
  {
#if defined(_OPENMP)
    uint32_t* own = scratch + omp_get_thread_num() * round_up(at.thread, 16);
#else
    uint32_t* own = scratch;
#endif
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.kv_heads * tiles; ++i)
      pack_keys<Units, T>(a, at, i / tiles, i % tiles, keys + i / tiles * at.keys, values + i / tiles * at.values);
    // One kv head after the other, so that its keys and values stay in the second cache.
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < a.kv_heads * tasks; ++i) {
      const int64_t head = i / tasks;
      const int64_t* range = a.ranges;
      int64_t task = i % tasks;
      for (; task >= tasks_of(a, range); range += 6) task -= tasks_of(a, range);
      const int64_t first = task * TASK_ROWS, left = (range[1] - range[0]) * (a.heads / a.kv_heads) - first;
      attend<Units, T>(a, at, range, head, first, left < TASK_ROWS ? left : TASK_ROWS, keys + head * at.keys,
                       values + head * at.values, own);
    }
  }
}

#if defined(__AVX512BF16__)
using Bf16Units = PairUnits;
#else
using Bf16Units = FloatUnits;
#endif

int64_t attention_workspace(const Attention& a) {
  return 4 * (a.bf16 ? Layout<Bf16Units>(a).total(a) : Layout<FloatUnits>(a).total(a));
}

void attention(const Attention& a) {
  if (a.bf16) return attention_in<Bf16Units, uint16_t>(a);
  attention_in<FloatUnits, float>(a);
}

}  // namespace
