// Matrix product with float8 weights, whose scales are one an output. Included once an instruction set.
//
// The weights of TILE_WIDTH outputs are decoded and transposed once, into a panel that stays in the second cache and
// meets all rows of x. So few rows that decoding costs more than multiplying take the weights as they lie in memory.
#include <type_traits>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bf16.inl"
#include "float8.inl"
#include "ops.h"
#include "vector.inl"

namespace {

using horsepower::Linear;

constexpr int64_t BLOCK_UNITS = 128;  // of products summed at once: float32 rounds sums of sums less than one long sum
constexpr int FEW_ROWS = 8;

// Of a panel, whose depth is filled up to what is decoded at once.
template <typename Units>
int64_t panel_units(const Linear& a) {
  return (a.depth + 63) / 64 * (64 / Units::DEPTH) * TILE_WIDTH;
}

// How weights are decoded.
// decode: `outputs` rows of codes to units, [units of depth][TILE_WIDTH]; what lies beyond either is zero.
// add_dots: STEP codes of some outputs with as many values of some rows.
template <typename Units>
struct Decoder;

template <>
struct Decoder<FloatUnits> {
  static constexpr int STEP = LANES;

  static void decode(const uint8_t* codes, int64_t pitch, int64_t depth, int64_t outputs, uint32_t* panel) {
    for (int64_t i = 0; i < depth; i += LANES, panel += LANES * TILE_WIDTH)
      for (int64_t o = 0; o < outputs; o += LANES) {
        Floats x[LANES] = {};
        for (int64_t j = 0; j < LANES && o + j < outputs; ++j) {
          const uint8_t* from = codes + (o + j) * pitch + i;
          uint8_t last[LANES] = {};
          if (depth - i < LANES) from = static_cast<uint8_t*>(__builtin_memcpy(last, from, depth - i));
          x[j] = widen_codes(from);
        }
        transpose(x);
        for (int j = 0; j < LANES; ++j) store(x[j], panel + j * TILE_WIDTH + o);
      }
  }

  template <int rows, int outputs, typename T>
  static void add_dots(const T* x, int64_t x_pitch, const uint8_t* codes, int64_t pitch,
                       Floats (&total)[rows][outputs]) {
    Floats value[rows];
    for (int r = 0; r < rows; ++r) value[r] = widen_row(x + r * x_pitch);
    for (int n = 0; n < outputs; ++n) {
      const Floats weight = widen_codes(codes + n * pitch);
      for (int r = 0; r < rows; ++r) total[r][n] += value[r] * weight;
    }
  }

  static Floats widen_row(const float* from) { return load(from); }
  static Floats widen_row(const uint16_t* from) { return reinterpret_cast<Floats>(load_ints(from) << 16); }
};

#if defined(__AVX512BF16__)
template <>
struct Decoder<PairUnits> {
  static constexpr int STEP = 64;

  static void decode(const uint8_t* codes, int64_t pitch, int64_t depth, int64_t outputs, uint32_t* panel) {
    for (int64_t i = 0; i < depth; i += 64, panel += 32 * TILE_WIDTH) {
      const __mmask64 mask = depth - i < 64 ? (__mmask64{1} << (depth - i)) - 1 : ~__mmask64{0};
      for (int64_t o = 0; o < outputs; o += 16) {
        const uint8_t* from = codes + o * pitch + i;
        Floats x[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          const bool there = o + j < outputs;
          x[j] = reinterpret_cast<Floats>(_mm512_maskz_loadu_epi8(there ? mask : 0, from + (there ? j * pitch : 0)));
        }
        transpose(x);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          const Bf16Codes pairs(reinterpret_cast<__m512i>(x[j]), PAIRS_APART);
          _mm512_storeu_si512(panel + 2 * j * TILE_WIDTH + o, pairs.first);
          _mm512_storeu_si512(panel + (2 * j + 1) * TILE_WIDTH + o, pairs.second);
        }
      }
    }
  }

  template <int rows, int outputs>
  static void add_dots(const uint16_t* x, int64_t x_pitch, const uint8_t* codes, int64_t pitch,
                       Floats (&total)[rows][outputs]) {
Floats weight[outputs][2];
#pragma GCC unroll 4
    for (int n = 0; n < outputs; ++n) {
      const Bf16Codes some(_mm512_loadu_si512(codes + n * pitch), IN_ORDER);
      weight[n][0] = reinterpret_cast<Floats>(some.first);
      weight[n][1] = reinterpret_cast<Floats>(some.second);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const Floats value = load(x + r * x_pitch + 32 * half);
#pragma GCC unroll 4
        for (int n = 0; n < outputs; ++n)
          total[r][n] = PairUnits::multiply_add(total[r][n], value, weight[n][half]);
      }
  }
};
#endif

// All rows of one expert, and the outputs of one panel.
template <typename T>
struct Part {
  const T* x;
  const uint8_t* codes;
  const float* scales;
  T* out;
  int64_t rows, outputs;
};

template <typename T>
inline void write(const float* total, const float* scales, int64_t count, T* out) {
  int64_t n = 0;
#if defined(__AVX512BF16__)
  // The conversion takes denormals for zeros, as the products before it did.
  if constexpr (sizeof(T) == 2)
    for (; n + 32 <= count; n += 32) {
      const auto scaled = [&](int64_t at) { return load(total + at) * load(scales + at); };
      store(reinterpret_cast<Floats>(_mm512_cvtne2ps_pbh(scaled(n + 16), scaled(n))), out + n);
    }
#endif
  for (; n < count; ++n) narrow(total[n] * scales[n], out + n);
}

// `rows` rows from `first` on.
template <typename Units, int rows, int vectors, typename T>
void multiply(const Linear& a, const Part<T>& part, const uint32_t* panel, int64_t first) {
  const T* x = part.x + first * a.x_pitch;
  const int64_t units = a.depth / Units::DEPTH;
  Floats total[rows][vectors] = {};
  add_products<Units>(x, a.x_pitch, panel, TILE_WIDTH, units < BLOCK_UNITS ? units : BLOCK_UNITS, total);
  for (int64_t from = BLOCK_UNITS; from < units; from += BLOCK_UNITS) {
    const int64_t some = units - from < BLOCK_UNITS ? units - from : BLOCK_UNITS;
    Floats more[rows][vectors] = {};
    add_products<Units>(x + from * Units::DEPTH, a.x_pitch, panel + from * TILE_WIDTH, TILE_WIDTH, some, more);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < vectors; ++n) total[r][n] += more[r][n];
  }
  if constexpr (Units::DEPTH == 2)
    if (a.depth % 2) {
      uint32_t last[rows];
      for (int r = 0; r < rows; ++r) last[r] = x[r * a.x_pitch + a.depth - 1];
      add_products<Units>(last, 1, panel + units * TILE_WIDTH, TILE_WIDTH, 1, total);
    }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    float sums[vectors * LANES];
#pragma GCC unroll 8
    for (int n = 0; n < vectors; ++n) store(total[r][n], sums + n * LANES);
    write(sums, part.scales, part.outputs, part.out + (first + r) * a.out_pitch);
  }
}

template <typename Units, int rows, typename T>
void multiply_rows(const Linear& a, const Part<T>& part, const uint32_t* panel, int64_t first, int64_t count) {
  if constexpr (rows > 1)
    if (count < rows) return multiply_rows<Units, rows - 1>(a, part, panel, first, count);
  const int64_t vectors = (part.outputs + LANES - 1) / LANES;
  if (vectors == 1) return multiply<Units, rows, 1>(a, part, panel, first);
  if (vectors == 2) return multiply<Units, rows, 2>(a, part, panel, first);
  if (vectors == 3) return multiply<Units, rows, TILE_VECTORS < 3 ? 2 : 3>(a, part, panel, first);
  multiply<Units, rows, TILE_VECTORS>(a, part, panel, first);
}

// At most FEW_ROWS rows with all outputs, without a panel.
template <typename Units, int rows, typename T>
void multiply_few(const Linear& a, const Part<T>& part) {
  if constexpr (rows > 1)
    if (part.rows < rows) return multiply_few<Units, rows - 1>(a, part);
  constexpr int STEP = Decoder<Units>::STEP, OUTPUTS = rows <= 4 ? 4 : 2;
  const int64_t whole = a.depth / STEP * STEP, left = a.depth - whole;
  T last[rows][STEP] = {};
  float sums[rows][TILE_WIDTH];
  for (int r = 0; r < rows; ++r) __builtin_memcpy(last[r], part.x + r * a.x_pitch + whole, left * sizeof(T));
  const auto dots = [&](auto outputs, int64_t o) {
    constexpr int count = decltype(outputs)::value;
    const uint8_t* codes = part.codes + o * a.codes_pitch;
    Floats total[rows][count] = {};
    for (int64_t from = 0; from < whole; from += BLOCK_UNITS * STEP) {
      const int64_t end = whole - from < BLOCK_UNITS * STEP ? whole : from + BLOCK_UNITS * STEP;
      Floats some[rows][count] = {};
      for (int64_t i = from; i < end; i += STEP)
        Decoder<Units>::add_dots(part.x + i, a.x_pitch, codes + i, a.codes_pitch, some);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < count; ++n) total[r][n] += some[r][n];
    }
    if (left) {
      uint8_t rest[count][STEP] = {};
      for (int n = 0; n < count; ++n) __builtin_memcpy(rest[n], codes + n * a.codes_pitch + whole, left);
      Decoder<Units>::add_dots(last[0], STEP, rest[0], STEP, total);
    }
    Floats flat[(rows * count + 3) / 4 * 4] = {};
    float each[(rows * count + 3) / 4 * 4];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < count; ++n) flat[r * count + n] = total[r][n];
#pragma GCC unroll 8
    for (int i = 0; i < rows * count; i += 4) sum_each(flat + i, each + i);
    for (int r = 0; r < rows; ++r) __builtin_memcpy(sums[r] + o, each + r * count, count * sizeof(float));
  };
  int64_t o = 0;
  for (; o + OUTPUTS <= part.outputs; o += OUTPUTS) dots(std::integral_constant<int, OUTPUTS>{}, o);
  for (; o < part.outputs; ++o) dots(std::integral_constant<int, 1>{}, o);
  for (int r = 0; r < rows; ++r) write(sums[r], part.scales, part.outputs, part.out + r * a.out_pitch);
}

// Tiles of one expert's rows by one panel's outputs; few rows are one tile.
inline int64_t tiles_of(int64_t rows) { return rows <= FEW_ROWS ? rows > 0 : (rows + TILE_ROWS - 1) / TILE_ROWS; }

// Tiles first...last of all experts' panels: a panel's tiles are neighbours, so that a thread decodes few panels.
template <typename Units, typename T>
void multiply_tiles(const Linear& a, int64_t first, int64_t last, uint32_t* panel) {
  const int64_t panels = (a.width + TILE_WIDTH - 1) / TILE_WIDTH;
  int64_t start = 0;
  for (int expert = 0; expert < 3; ++expert) {
    const int64_t row = expert ? a.first_rows[expert - 1] : 0, end = expert < 2 ? a.first_rows[expert] : a.rows;
    const int64_t tiles = tiles_of(end - row);
    for (int64_t i = 0; i < panels; ++i, start += tiles) {
      const int64_t from = first > start ? first - start : 0, to = last - start < tiles ? last - start : tiles;
      if (from >= to) continue;
      const int64_t output = i * TILE_WIDTH, left = a.width - output;
      const Part<T> part{static_cast<const T*>(a.x) + row * a.x_pitch,
                         a.codes + (expert * a.width + output) * a.codes_pitch,
                         a.scales + expert * a.width + output,
                         static_cast<T*>(a.out) + row * a.out_pitch + output,
                         end - row,
                         left < TILE_WIDTH ? left : TILE_WIDTH};
      if (part.rows <= FEW_ROWS) {
        multiply_few<Units, FEW_ROWS>(a, part);
        continue;
      }
      Decoder<Units>::decode(part.codes, a.codes_pitch, a.depth, part.outputs, panel);
      for (int64_t tile = from; tile < to; ++tile) {
        const int64_t at = tile * TILE_ROWS, rows = part.rows - at < TILE_ROWS ? part.rows - at : TILE_ROWS;
        multiply_rows<Units, TILE_ROWS>(a, part, panel, at, rows);
      }
    }
  }
}

template <typename Units, typename T>
void linear_in(const Linear& a) {
  const int64_t panels = (a.width + TILE_WIDTH - 1) / TILE_WIDTH;
  const int64_t tiles = panels * (tiles_of(a.first_rows[0]) + tiles_of(a.first_rows[1] - a.first_rows[0]) +
                                  tiles_of(a.rows - a.first_rows[1]));
#pragma omp parallel num_threads(a.threads)
  {
#if defined(_OPENMP)
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
    const int64_t thread = 0, threads = 1;
#endif
    multiply_tiles<Units, T>(a, tiles * thread / threads, tiles * (thread + 1) / threads,
                             static_cast<uint32_t*>(a.workspace) + thread * panel_units<Units>(a));
  }
}

#if defined(__AVX512BF16__)
using LinearUnits = PairUnits;
#else
using LinearUnits = FloatUnits;
#endif

int64_t linear_workspace(const Linear& a) {
  return 4 * a.threads * (a.bf16 ? panel_units<LinearUnits>(a) : panel_units<FloatUnits>(a));
}

void linear(const Linear& a) {
  if (a.bf16) return linear_in<LinearUnits, uint16_t>(a);
  linear_in<FloatUnits, float>(a);
}

}  // namespace
