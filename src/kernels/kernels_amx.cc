// The table for CPUs with AMX (Sapphire Rapids and later): AVX-512 everywhere, except that bf16 products run
// on tiles, which are over ten times as fast there as the bf16 dot product of vectors.
//
// Panels are those of avx512_bf16 as they are: 16 rows of a chunk of A are a tile [16 rows][16 pairs of K], and 16
// units of a vector of B are a tile [16 pairs of K][16 columns].
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

#include "kernels/kernel_table.h"

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c,bmi2")

namespace coterie {
namespace {

constexpr bool kAsksPastCaches = false;
#include "kernels/avx512.inl"
#include "kernels/bf16.inl"
#include "kernels/kernels.inl"

constexpr int kTileRows = 16;
constexpr int kPanelRowsTiles = 2 * kTileRows;  // 2 x 2 tiles of sums, 2 of A, 2 of B: all eight
constexpr int64_t kPanelUnits = 32;             // units of a row of a panel of B
constexpr int64_t kSliceUnits = 128;            // a panel of A is 16 KiB then
constexpr int kLineBytes = 64, kPanelRowBytes = 128;

// Palette 1: every tile has 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

void begin_tiles() { _tile_loadconfig(&kTileConfig); }
void end_tiles() { _tile_release(); }

// Rows past kRows of the last tile of A hold what lies behind them in memory, and give sums that nobody reads.
template <int kRows>
void multiply_tiles(int64_t units, const uint32_t* a, const uint32_t* b, Ahead ahead, float* tile, bool add) {
  constexpr bool kSecond = kRows > kTileRows;
  float* const second = tile + kTileRows * kPanelUnits;
  if (add) {
    _tile_loadd(0, tile, kPanelRowBytes);
    _tile_loadd(1, tile + 16, kPanelRowBytes);
    if constexpr (kSecond) _tile_loadd(2, second, kPanelRowBytes);
    if constexpr (kSecond) _tile_loadd(3, second + 16, kPanelRowBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kSecond) _tile_zero(2);
    if constexpr (kSecond) _tile_zero(3);
  }
  for (; units > 0; units -= kChunkUnits, a += kRows * kChunkUnits, b += kChunkUnits * kPanelUnits) {
    _tile_loadd(6, b, kPanelRowBytes);
    _tile_loadd(4, a, kLineBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 16, kPanelRowBytes);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kSecond) {
      _tile_loadd(5, a + kTileRows * kChunkUnits, kLineBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    for (int64_t u = 0; u < kChunkUnits; ++u, ahead.start += ahead.step) {
      __builtin_prefetch(ahead.start);
      __builtin_prefetch(ahead.start + 16);
    }
  }
  _tile_stored(0, tile, kPanelRowBytes);
  _tile_stored(1, tile + 16, kPanelRowBytes);
  if constexpr (kSecond) _tile_stored(2, second, kPanelRowBytes);
  if constexpr (kSecond) _tile_stored(3, second + 16, kPanelRowBytes);
}

// Compact panels, a plain chunk at a time.
template <int kRows>
void multiply_compact_tiles(const CompactPanel& shape, const uint32_t* a, const uint32_t* compact, Ahead ahead,
                            float* tile) {
  alignas(64) uint32_t chunk[kChunkUnits * kPanelUnits];
  CompactReader b(shape, compact);
  for (int64_t i = 0; i < shape.chunks(); ++i, a += kRows * kChunkUnits, b.next_chunk()) {
    b.expand(chunk);
    multiply_tiles<kRows>(kChunkUnits, a, chunk, ahead, tile, i > 0);
    ahead.start += kChunkUnits * ahead.step;
  }
}

// 16 units of K of a vector of rows of the stored B, copied, with zeros for what is not there.
struct PaddedChunk {
  alignas(64) char lines[kTileRows][kLineBytes] = {};

  PaddedChunk(const PanelInPlace& b, int half, int64_t unit) {
    const int64_t left = 2 * b.cols - 4 * unit;
    const auto bytes = static_cast<size_t>(left < kLineBytes ? left : kLineBytes);
    for (int i = 0; i < b.count[half]; ++i) {
      __builtin_memcpy(lines[i], static_cast<const char*>(b.start[half]) + i * b.stride_bytes + 4 * unit, bytes);
    }
  }
};

// The strips' share of a step: the tiles 4 and 5 of B are loaded.
template <int kStrips>
COTERIE_INLINE void multiply_strips(const uint32_t* strips, int64_t strip_units) {
  _tile_loadd(6, strips, kLineBytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 5, 6);
  if constexpr (kStrips == 2) {
    _tile_loadd(7, strips + strip_units, kLineBytes);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// See multiply_in_place.inl: 16 rows of a line of the stored B are a tile as they are, and a strip is a row of tiles
// [16 pairs of K][16 rows of A].
template <int kStrips>
void multiply_tiles_along_k(const PanelInPlace& b, int64_t units, const uint32_t* strips, float* tile) {
  const auto *first = static_cast<const char*>(b.start[0]), *second = static_cast<const char*>(b.start[1]);
  const int64_t strip_units = whole_chunks(units) * kTileRows;
  const bool all_there = b.count[0] == kTileRows && b.count[1] == kTileRows;
  const int64_t whole = all_there ? b.cols / 2 / kChunkUnits * kChunkUnits : 0;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kStrips == 2) _tile_zero(2);
  if constexpr (kStrips == 2) _tile_zero(3);
  int64_t u = 0;
  for (; u < whole; u += kChunkUnits, strips += kChunkUnits * kTileRows) {
    _tile_loadd(4, first + 4 * u, b.stride_bytes);
    _tile_loadd(5, second + 4 * u, b.stride_bytes);
    multiply_strips<kStrips>(strips, strip_units);
    const int64_t ahead = b.byte_ahead(2 * b.cols, 4 * u);
    for (int i = 0; i < kTileRows; ++i) {
      __builtin_prefetch(first + ahead + i * b.stride_bytes, 0, 2);
      __builtin_prefetch(second + ahead + i * b.stride_bytes, 0, 2);
    }
  }
  for (; u < units; u += kChunkUnits, strips += kChunkUnits * kTileRows) {
    const PaddedChunk chunk0(b, 0, u), chunk1(b, 1, u);
    _tile_loadd(4, chunk0.lines, kLineBytes);
    _tile_loadd(5, chunk1.lines, kLineBytes);
    multiply_strips<kStrips>(strips, strip_units);
  }
  alignas(64) float sums[4][kTileRows * kTileRows];  // [column of C][row of A]
  _tile_stored(0, sums[0], kLineBytes);
  _tile_stored(1, sums[1], kLineBytes);
  if constexpr (kStrips == 2) _tile_stored(2, sums[2], kLineBytes);
  if constexpr (kStrips == 2) _tile_stored(3, sums[3], kLineBytes);
  for (int i = 0; i < 2 * kStrips; ++i) turn_sums(sums[i], tile + (i / 2 * kTileRows * 2 + i % 2) * kTileRows);
}

void multiply_tiles_along_k(const PanelInPlace& b, int64_t units, const uint32_t* strips, int64_t rows, float* tile) {
  if (rows <= kTileRows) return multiply_tiles_along_k<1>(b, units, strips, tile);
  multiply_tiles_along_k<2>(b, units, strips, tile);
}

// A chunk of a panel of B from columns that are contiguous.
COTERIE_INLINE void pair_rows(const PanelInPlace& b, int64_t unit, uint32_t* chunk) {
  const int64_t stride = b.stride_bytes;
  for (int half = 0; half < 2; ++half) {
    const char* p = static_cast<const char*>(b.start[half]) + 2 * unit * stride;
    for (int64_t u = 0; u < kChunkUnits; ++u, p += 2 * stride) {
      const int64_t left = b.cols - 2 * (unit + u);
      VU v = left > 0 ? load_halves(reinterpret_cast<const uint16_t*>(p)) : VU{};
      if (left > 1) v |= load_halves(reinterpret_cast<const uint16_t*>(p + stride)) << 16;
      store_units(chunk + u * kPanelUnits + half * kWidth, v);
      __builtin_prefetch(p + 2 * kPartUnits * stride, 0, 2);
      __builtin_prefetch(p + (2 * kPartUnits + 1) * stride, 0, 2);
    }
  }
}

// A chunk of the panel of B is made just before its turn.
template <int kRows>
void multiply_tiles_along_n(const PanelInPlace& b, int64_t units, const uint32_t* a, uint32_t* packed, float* tile) {
  alignas(64) uint32_t own_chunk[kChunkUnits * kPanelUnits];
  constexpr bool kSecond = kRows > kTileRows;
  float* const second = tile + kTileRows * kPanelUnits;
  _tile_loadd(0, tile, kPanelRowBytes);
  _tile_loadd(1, tile + 16, kPanelRowBytes);
  if constexpr (kSecond) _tile_loadd(2, second, kPanelRowBytes);
  if constexpr (kSecond) _tile_loadd(3, second + 16, kPanelRowBytes);
  for (int64_t u = 0; u < units; u += kChunkUnits, a += kRows * kChunkUnits) {
    uint32_t* const chunk = packed ? packed + u * kPanelUnits : own_chunk;
    pair_rows(b, u, chunk);
    _tile_loadd(6, chunk, kPanelRowBytes);
    _tile_loadd(7, chunk + 16, kPanelRowBytes);
    _tile_loadd(4, a, kLineBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kSecond) {
      _tile_loadd(5, a + kTileRows * kChunkUnits, kLineBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, tile, kPanelRowBytes);
  _tile_stored(1, tile + 16, kPanelRowBytes);
  if constexpr (kSecond) _tile_stored(2, second, kPanelRowBytes);
  if constexpr (kSecond) _tile_stored(3, second + 16, kPanelRowBytes);
}

constexpr int kPeakProducts = 4;

float tile_peak(int64_t steps) {
  begin_tiles();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  alignas(64) float sums[kTileRows * 16];
  _tile_stored(0, sums, kLineBytes);
  end_tiles();
  return sums[0];
}

template <int... kIndex>
constexpr void fill_tiles(KernelTable& table, std::integer_sequence<int, kIndex...>) {
  ((table.multiply[1][kIndex] = multiply_tiles<kIndex + 1>), ...);
  ((table.multiply_into_rows[1][kIndex] = nullptr), ...);
  ((table.multiply_compact[kIndex] = multiply_compact_tiles<kIndex + 1>), ...);
  ((table.multiply_along_n[1][kIndex] = multiply_tiles_along_n<kIndex + 1>), ...);
}

constexpr KernelTable with_tiles(KernelTable table) {
  table.compact_pays = false;
  table.panel_rows[index_of(PanelType::kBF16)] = kPanelRowsTiles;
  table.slice_units[1] = kSliceUnits;
  fill_tiles(table, std::make_integer_sequence<int, kPanelRowsTiles>());
  table.few_rows[1] = 0;  // rows of B are tiles as they are
  table.multiply_along_k[1] = multiply_tiles_along_k;
  table.begin_products = begin_tiles;
  table.end_products = end_tiles;
  table.register_peak[1] = tile_peak;
  table.register_peak_flops[1] = kPeakProducts * 2 * int64_t{kTileRows} * 16 * 32;
  return table;
}

}  // namespace

constexpr KernelTable kAmxKernels = with_tiles(make_kernel_table("amx"));

}  // namespace coterie

#pragma GCC pop_options

namespace coterie {

bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace coterie
