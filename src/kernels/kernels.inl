// The kernels, one concept a file, and the table of them. See kernel_table.h for what each one does.
// Included once per ISA, inside its target region and anonymous namespace.

// clang-format off: each builds on those before it
#include "kernels/math.inl"
#include "kernels/rows.inl"
#include "kernels/quantize.inl"
#include "kernels/pack.inl"
#include "kernels/pack_quantized.inl"
#include "kernels/compact_reader.inl"
#include "kernels/compact.inl"
#include "kernels/store_tile.inl"
#include "kernels/multiply.inl"
#include "kernels/multiply_compact.inl"
#include "kernels/multiply_quantized.inl"
#include "kernels/multiply_in_place.inl"
#include "kernels/activation_rows.inl"
#include "kernels/attend.inl"
#include "kernels/causal_rows.inl"
#include "kernels/adamw_rows.inl"
// clang-format on

constexpr KernelTable make_kernel_table(std::string_view name) {
  KernelTable table = {};
  table.name = name;
  table.width = kWidth;
  table.panel_rows[0] = kPanelRowsF32;
  table.panel_rows[1] = kPanelRowsBf16;
  table.slice_units[0] = table.slice_units[1] = std::numeric_limits<int64_t>::max();
  table.widens_bf16 = !kMultipliesBf16;
  table.pack_a = pack_a;
  table.pack_b = pack_b;
  fill_multiply<false>(table, std::make_integer_sequence<int, kPanelRowsF32>());
  fill_multiply<true>(table, std::make_integer_sequence<int, kPanelRowsBf16>());
  fill_compact(table, std::make_integer_sequence<int, kPanelRowsBf16>());
  table.compact_pays = kVectorBytes == 64;
  table.compact_panel = compact_panel;
  table.quantize_weights_row = quantize_weights_row;
  table.pack_quantized_b = pack_quantized_b;
  fill_quantized<PanelType::kInt8>(table);
  fill_quantized<PanelType::kInt8A16>(table);
  fill_quantized<PanelType::kInt4Group64>(table);
  fill_quantized<PanelType::kInt4>(table);
  fill_quantized<PanelType::kMxfp4>(table);
  fill_few<false>(table, std::make_integer_sequence<int, kFewRows>());
  fill_few<true>(table, std::make_integer_sequence<int, kFewRows>());
  table.pack_strips = pack_strips;
  table.multiply_along_k[0] = multiply_along_k<false>;
  if constexpr (kMultipliesBf16) table.multiply_along_k[1] = multiply_along_k<true>;
  fill_along_n<false>(table.multiply_along_n[0], std::make_integer_sequence<int, kPanelRowsF32>());
  fill_along_n<true>(table.multiply_along_n[1], std::make_integer_sequence<int, kPanelRowsBf16>());
  table.begin_products = table.end_products = [] {};
  table.store_tile = store_tile;
  table.register_peak[0] = register_peak<false>;
  table.register_peak[1] = register_peak<true>;
  table.register_peak_flops[0] = int64_t{kPeakSums} * kWidth * 2;
  table.register_peak_flops[1] = int64_t{kPeakSums} * kWidth * (kMultipliesBf16 ? 4 : 2);
  table.rms_norm_row = rms_norm_row;
  table.rms_norm_backward_row = rms_norm_backward_row;
  table.layer_norm_row = layer_norm_row;
  table.layer_norm_backward_row = layer_norm_backward_row;
  table.softmax_row = softmax_row;
  table.rope_head = rope_head;
  table.attend = attend;
  table.exponentials_row = exponentials_row;
  table.attention_backward_row = attention_backward_row;
  table.square_sum_row = square_sum_row;
  table.round_randomly_row = round_randomly_row;
  table.adamw_row = adamw_row;
  table.convert_row = convert_row;
  table.quantize_row = quantize_row;
  table.quantize_row_wide = quantize_row_wide;
  table.widen_row = widen_row;
  table.scale_row = scale_row;
  table.add_row = add_row;
  table.dot_row = dot_row;
  table.combine_rows = combine_rows;
  table.activate_backward_row = activate_backward_row;
  return table;
}
