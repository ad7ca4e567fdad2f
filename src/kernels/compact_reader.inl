// Compact panels of bf16 (panels.h) as products read them: expanded in registers, or chunk by chunk.

typedef uint8_t VBytes __attribute__((vector_size(kVectorBytes)));
constexpr auto kAllBytes = std::make_integer_sequence<int, kVectorBytes>();

// In every 16 bytes: 8 of a from kFirst on, each before that of b.
template <int kFirst, int... kByte>
COTERIE_INLINE VU interleave_bytes(VBytes a, VBytes b, std::integer_sequence<int, kByte...>) {
  constexpr VBytes kOrder = {
      static_cast<uint8_t>(kByte / 16 * 16 + kFirst + kByte % 16 / 2 + kByte % 2 * kVectorBytes)...};
  return reinterpret_cast<VU>(__builtin_shuffle(a, b, kOrder));
}

// Codes, a byte each.
COTERIE_INLINE void expand_unit(VU low, VU codes, VBytes bases, VU (&unit)[2]) {
  // The sign is the bit above the offset: adding carries it up.
  const VBytes high = ((reinterpret_cast<VBytes>(codes) + 0x78) & 0x87) + bases;
  unit[0] = interleave_bytes<0>(reinterpret_cast<VBytes>(low), high, kAllBytes);
  unit[1] = interleave_bytes<8>(reinterpret_cast<VBytes>(low), high, kAllBytes);
}

// Compact panels are read chunk by chunk.
struct CompactReader {
  static constexpr int64_t kPair = 3 * kWidth, kRow = 2 * kWidth;
  const char* begins;
  const uint32_t* patches;
  const uint32_t* codes;
  VBytes bases;

  COTERIE_INLINE CompactReader(const CompactPanel& shape, const uint32_t* compact)
      : begins(reinterpret_cast<const char*>(compact + shape.begins())),
        patches(compact + shape.patches()),
        codes(compact + shape.codes()),
        bases(reinterpret_cast<VBytes>(load_units(compact))) {}

  COTERIE_INLINE void next_chunk() {
    codes += kChunkUnits / 2 * kPair;
    begins += sizeof(uint16_t);
  }
  // Of the chunk's first patch, or of the next chunk's.
  COTERIE_INLINE int64_t first_patch(bool of_next = false) const {
    uint16_t index;
    __builtin_memcpy(&index, begins + (of_next ? sizeof index : 0), sizeof index);
    return index;
  }
  COTERIE_INLINE bool has_patches() const { return first_patch() != first_patch(true); }

  // Two units of the chunk, u even, without their patches.
  COTERIE_INLINE void load_pair(int64_t u, VU (&units)[2][2]) const {
    const uint32_t* const pair = codes + u / 2 * kPair;
    const VU both = load_units(pair + 2 * kWidth);
    expand_unit(load_units(pair), both & 0x0f0f0f0fu, bases, units[0]);
    expand_unit(load_units(pair + kWidth), (both >> 4) & 0x0f0f0f0fu, bases, units[1]);
  }
  // With them. `patch` goes from the chunk's first one on, from pair to pair.
  COTERIE_INLINE void load_patched_pair(int64_t u, int64_t& patch, VU (&units)[2][2]) const {
    constexpr uint32_t kElements = 4 * kRow;  // of a pair
    const auto first = static_cast<uint32_t>(u / 2) * kElements;
    const auto here = [&] { return patch < first_patch(true) && (patches[patch] & 0xffffu) - first < kElements; };
    load_pair(u, units);
    if (!here()) return;
    alignas(kVectorBytes) uint16_t elements[kElements];
    __builtin_memcpy(elements, units, sizeof elements);
    for (; here(); ++patch) elements[(patches[patch] & 0xffffu) - first] = static_cast<uint16_t>(patches[patch] >> 16);
    __builtin_memcpy(units, elements, sizeof elements);
  }

  // The chunk as rows of a plain panel.
  COTERIE_INLINE void expand(uint32_t* rows) const {
    int64_t patch = first_patch();
    for (int64_t u = 0; u < kChunkUnits; u += 2) {
      VU units[2][2];
      load_patched_pair(u, patch, units);
      __builtin_memcpy(rows + u * kRow, units, sizeof units);
    }
  }
};
