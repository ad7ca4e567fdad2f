// Compact panels of bf16, made of plain ones. See panels.h.

constexpr uint8_t kMostOffset = 7;  // from the base

// In every 16 bytes: the even ones of a, then those of b; or the odd ones.
template <int kOdd, int... kByte>
COTERIE_INLINE VBytes separate_bytes(VU a, VU b, std::integer_sequence<int, kByte...>) {
  constexpr VBytes kOrder = {
      static_cast<uint8_t>(kByte / 16 * 16 + kByte % 8 * 2 + kOdd + kByte % 16 / 8 * kVectorBytes)...};
  return __builtin_shuffle(reinterpret_cast<VBytes>(a), reinterpret_cast<VBytes>(b), kOrder);
}

// The elements of a unit of K of a panel taken apart.
struct SplitUnit {
  VBytes low, sign, exponent;  // seven bits of it

  COTERIE_INLINE explicit SplitUnit(const uint32_t* unit) {
    const VU first = load_units(unit), second = load_units(unit + kWidth);
    const VBytes high = separate_bytes<1>(first, second, kAllBytes);
    low = separate_bytes<0>(first, second, kAllBytes);
    sign = high & 0x80;
    exponent = high & 0x7f;
  }
};

// The place in the row of a panel of the element that byte i of a split unit belongs to.
constexpr int place_of_byte(int i) { return i % 16 / 8 * 2 * kWidth + i / 16 * 8 + i % 8; }

struct PatchList {
  const CompactPanel& shape;
  uint32_t* compact;
  int64_t count = 0;

  void begin_chunk(int64_t chunk) const {
    const auto begin = static_cast<uint16_t>(count);
    __builtin_memcpy(reinterpret_cast<char*>(compact + shape.begins()) + 2 * chunk, &begin, sizeof begin);
  }
  // Elements of unit u without a code. False where there is no room.
  bool add(int64_t u, const uint32_t* unit, VBytes offsets) {
    for (int i = 0; i < kVectorBytes; ++i) {
      const int place = place_of_byte(i);
      if (offsets[i] <= kMostOffset || 2 * u + place % 2 >= shape.K) continue;
      if (count == shape.most_patches()) return false;
      const uint32_t element = unit[place / 2] >> place % 2 * 16 & 0xffffu;
      const auto in_chunk = static_cast<uint32_t>(u % kChunkUnits * 4 * kWidth + place);
      compact[shape.patches() + count++] = in_chunk | element << 16;
    }
    return true;
  }
};

bool compact_panel(const CompactPanel& shape, const uint32_t* panel, uint32_t* compact) {
  constexpr int64_t kRow = 2 * kWidth, kPair = 3 * kWidth;
  VBytes most = kMostOffset | VBytes{};
  for (int64_t u = 0; u < shape.units(); ++u) {
    const VBytes exponent = SplitUnit(panel + u * kRow).exponent;
    most = exponent > most ? exponent : most;
  }
  const VBytes bases = most - kMostOffset;
  __builtin_memset(compact, 0, static_cast<size_t>(shape.codes()) * sizeof *compact);
  store_units(compact, reinterpret_cast<VU>(bases));
  PatchList patches = {shape, compact};
  VU codes[2];
  for (int64_t u = 0; u < shape.units(); ++u) {
    const SplitUnit split(panel + u * kRow);
    const VBytes offsets = split.exponent - bases;
    if (u % kChunkUnits == 0) patches.begin_chunk(u / kChunkUnits);
    const bool all = sum_lanes(reinterpret_cast<VI>(offsets > kMostOffset) != 0) == 0;
    if (!all && !patches.add(u, panel + u * kRow, offsets)) return false;
    codes[u % 2] = reinterpret_cast<VU>((offsets & kMostOffset) | split.sign >> 4);
    uint32_t* const pair = compact + shape.codes() + u / 2 * kPair;
    store_units(pair + u % 2 * kWidth, reinterpret_cast<VU>(split.low));
    if (u % 2 == 1) store_units(pair + 2 * kWidth, codes[0] | codes[1] << 4);
  }
  patches.begin_chunk(shape.chunks());
  return true;
}
