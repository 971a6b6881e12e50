#include "ffi/decode.h"

#include <algorithm>
#include <string>
#include <vector>

#include "attention/dense_mask.h"
#include "attention/prepared_value.h"
#include "attention/visibility.h"
#include "call/text.h"

namespace jax_fa3 {
namespace {

using xla::ffi::DataType;

constexpr std::uintptr_t kPacketAlignment = 16;  // bytes, of an array read by TMA or by wide loads
constexpr std::uintptr_t kWordAlignment = 4;     // bytes, of fp32 and int32 arrays

std::uintptr_t alignment_of(Element element) {
  switch (element) {
    case Element::kInput:
    case Element::kOutput:
      return kPacketAlignment;
    case Element::kFloat32:
    case Element::kInt32:
      return kWordAlignment;
    case Element::kByte:
    case Element::kBool:
    case Element::kAny:
      break;
  }
  return 1;
}

bool has_16_bits(DataType type) { return type == DataType::BF16 || type == DataType::F16; }

constexpr bool is_letter(char c) { return c >= 'A'; }

template <class Range>
std::string extents_text(const Range& extents) {
  std::string text = "[";
  for (const std::int64_t extent : extents) {
    text += concat(text.size() > 1 ? ", " : "", extent);
  }
  return text + "]";
}

std::int64_t num_blocks(std::int64_t rows) { return ceil_div<std::int64_t>(rows, kDescaleBlock); }

// Rows or keys for a layout's arithmetic; what is longer is refused elsewhere.
int clamped(std::int64_t n) { return static_cast<int>(std::min<std::int64_t>(n, kMaxSeqlen)); }

}  // namespace

Extents::Extents(const Types& types) : types_(types) {
  std::fill_n(extents_, kLetters, -1);
  if (types.seqlen_q >= 0) learn('s', types.seqlen_q);
  if (types.seqlen_k >= 0) learn('t', types.seqlen_k);
}

Status Extents::take(const Operand& operand, const xla::ffi::AnyBuffer& buffer) {
  JFA_CHECK_OK(check_type(operand, buffer.element_type()));
  if (operand.dims == nullptr) return {};
  const auto got = buffer.dimensions();
  const auto expected = [&](std::size_t i) {
    return is_letter(operand.dims[i]) ? (*this)[operand.dims[i]] : operand.dims[i] - '0';
  };
  const std::size_t rank = std::char_traits<char>::length(operand.dims);
  bool same = got.size() == rank;
  for (std::size_t i = 0; same && i < rank; ++i) {
    same = expected(i) == -1 || expected(i) == got[i];
  }
  if (!same) {
    std::vector<std::int64_t> extents;
    for (std::size_t i = 0; i < rank; ++i) extents.push_back(expected(i));
    return invalid_argument(concat(operand.name, " must have shape ", extents_text(extents),
                                   ", got ", extents_text(got)));
  }
  for (std::size_t i = 0; i < rank; ++i) {
    if (expected(i) != -1) continue;
    JFA_CHECK_OK(check_choice(operand, operand.dims[i], got[i]));
    learn(operand.dims[i], got[i]);
  }
  return {};
}

Status Extents::check_type(const Operand& operand, DataType got) {
  DataType expected = DataType::INVALID;
  switch (operand.element) {
    case Element::kInput:
    case Element::kOutput: {
      const bool is_input = operand.element == Element::kInput || !types_.output.has_value();
      DataType& type = is_input ? types_.input : *types_.output;
      if (type == Types::kAny16Bit) {
        if (!has_16_bits(got)) {
          return invalid_argument(concat(operand.name, " must be BF16 or F16, got ", got));
        }
        type = got;
      }
      expected = type;
      break;
    }
    case Element::kFloat32:
      expected = DataType::F32;
      break;
    case Element::kInt32:
      expected = DataType::S32;
      break;
    case Element::kByte:
      expected = DataType::U8;
      break;
    case Element::kBool:
      expected = DataType::PRED;
      break;
    case Element::kAny:
      return {};
  }
  if (got == expected) return {};
  return invalid_argument(concat(operand.name, " must be ", expected, ", got ", got));
}

// Some dimensions follow from others.
void Extents::learn(char letter, std::int64_t extent) {
  extents_[index(letter)] = extent;
  if (letter == 's') extents_[index('G')] = DenseMaskLayout{clamped(extent), 1}.groups();
  if (letter == 's' && types_.descale_each_block) extents_[index('m')] = num_blocks(extent);
  if (letter != 't') return;
  if (types_.descale_each_block) extents_[index('n')] = num_blocks(extent);
  extents_[index('p')] = padded_keys(extent);
  extents_[index('r')] = padded_bias_keys(extent);
  extents_[index('W')] = DenseMaskLayout{1, clamped(extent)}.class_words();
  extents_[index('v')] = PlaneLayout{clamped((*this)['s']), clamped(extent)}.words();
}

std::int64_t Extents::mask_words(std::int64_t rows) const {
  return DenseMaskLayout{clamped(rows), clamped((*this)['t'])}.words();
}

std::int64_t Extents::mask_rows() const { return (*this)['u'] == mask_words(1) ? 1 : (*this)['s']; }

// Some have a choice of two, or of divisors.
Status Extents::check_choice(const Operand& operand, char letter, std::int64_t extent) const {
  for (const auto& choice : operands::kOneOrAll) {
    const std::int64_t all = (*this)[choice.all];
    if (letter != choice.letter || extent == 1 || extent == all) continue;
    return invalid_argument(
        concat(operand.name, " must have 1 or ", all, " ", choice.what, ", got ", extent));
  }
  if (operands::kDivisorsOfBatch.find(letter) != std::string_view::npos) {
    const std::int64_t batch = (*this)['b'];
    if (extent > 0 && batch % extent == 0) return {};
    return invalid_argument(concat(operand.name, " must have a number of sequences that divides ",
                                   batch, ", got ", extent));
  }
  if (letter == 'm' || letter == 'n') {
    const std::int64_t blocks = num_blocks((*this)[letter == 'm' ? 's' : 't']);
    if (extent == 1 || extent == blocks) return {};
    return invalid_argument(concat(operand.name, " must have 1 or ", blocks,
                                   " scales of a head (one for ", kDescaleBlock, " rows), got ",
                                   extent));
  }
  if (letter == 'u') {
    const std::int64_t rows = (*this)['s'], one = mask_words(1), each = mask_words(rows);
    if (extent == one || extent == each) return {};
    return invalid_argument(concat(operand.name, " must have ", one, " words of one row or ", each,
                                   " of ", rows, " rows, got ", extent));
  }
  return {};
}

Shape Extents::shape() const {
  const DataType out = types_.output.value_or(types_.input);
  const DataType type = has_16_bits(out) ? out : types_.input;
  Shape shape;
  shape.dtype = type == DataType::F16 ? DType::kFP16 : DType::kBF16;
  shape.batch = (*this)['b'];
  shape.seqlen_q = (*this)['s'];
  shape.seqlen_k = (*this)['t'];
  shape.num_heads_q = (*this)['h'];
  shape.num_heads_kv = (*this)['k'];
  shape.head_dim = (*this)['d'];
  shape.head_dim_v = (*this)['e'];
  return shape;
}

Status wrong_names(const char* side, Names names, std::string_view got, const Operand* next) {
  const std::string in_its_place = concat(" in its place, got '", names.text(), "'");
  if (next != nullptr)
    return invalid_argument(concat(side, " must have ", next->name, in_its_place));
  return invalid_argument(concat(side, " must not have ", got, in_its_place));
}

Status wrong_count(const char* side, Names names, std::size_t got) {
  return invalid_argument(
      concat(side, " must name all arrays of which there are ", got, ", got '", names.text(), "'"));
}

Status check_aligned(const Operand& operand, std::uintptr_t alignment, const void* address) {
  if (alignment == 0) alignment = alignment_of(operand.element);
  if (reinterpret_cast<std::uintptr_t>(address) % alignment == 0) return {};
  return invalid_argument(
      concat(operand.name, " must be aligned to ", alignment, " bytes, got address ", address));
}

}  // namespace jax_fa3
