// The table for CPUs with AMX (Sapphire Rapids and later): AVX-512 everywhere, except that bf16 products run
// on tiles, which are over ten times as fast there as the bf16 dot product of vectors.
//
// Panels are those of AVX-512 as they are: 16 rows of a chunk of A are a tile [16 rows][16 pairs of K], and 16
// units of a vector of B are a tile [16 pairs of K][16 columns].
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <utility>

#include "kernels/kernel_table.h"

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace coterie {
namespace {

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
void multiply_tiles(int64_t units, const uint32_t* a, const uint32_t* b, float* tile, bool add) {
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
    } else {
      // With few rows B comes from memory.
      for (int64_t line = 0; line < kChunkUnits * kPanelUnits; line += 16) {
        __builtin_prefetch(b + 2 * kChunkUnits * kPanelUnits + line);
      }
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
void fill_multiply(KernelTable& table, std::integer_sequence<int, kIndex...>) {
  ((table.multiply[1][kIndex] = multiply_tiles<kIndex + 1>), ...);
}

KernelTable with_tiles(KernelTable table) {
  table.name = "amx";
  table.panel_rows[1] = kPanelRowsTiles;
  table.slice_units[1] = kSliceUnits;
  fill_multiply(table, std::make_integer_sequence<int, kPanelRowsTiles>());
  table.begin_products = begin_tiles;
  table.end_products = end_tiles;
  table.register_peak[1] = tile_peak;
  table.register_peak_flops[1] = kPeakProducts * 2 * int64_t{kTileRows} * 16 * 32;
  return table;
}

}  // namespace

// kAvx512Kernels is a constant, there before any initialisation runs.
const KernelTable kAmxKernels = with_tiles(kAvx512Kernels);

bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace coterie

#pragma GCC pop_options
