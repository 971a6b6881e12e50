#include "ffi/decode.h"

#include <algorithm>
#include <string>

#include "attention/prepared_value.h"
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
      break;
  }
  return 1;
}

bool has_16_bits(DataType type) { return type == DataType::BF16 || type == DataType::F16; }

template <class Range>
std::string extents_text(const Range& extents) {
  std::string text = "[";
  for (const std::int64_t extent : extents) {
    text += concat(text.size() > 1 ? ", " : "", extent);
  }
  return text + "]";
}

std::int64_t num_blocks(std::int64_t rows) { return ceil_div<std::int64_t>(rows, kDescaleBlock); }

}  // namespace

Extents::Extents(const Types& types) : types_(types) { std::fill_n(extents_, 26, -1); }

Status Extents::take(const Operand& operand, const xla::ffi::AnyBuffer& buffer) {
  JFA_CHECK_OK(check_type(operand, buffer.element_type()));
  const std::string dims = operand.dims;
  const auto is_letter = [](char c) { return c >= 'a'; };
  const auto got = buffer.dimensions();
  std::vector<std::int64_t> expected;
  for (const char c : dims) expected.push_back(is_letter(c) ? (*this)[c] : c - '0');
  const bool same = got.size() == expected.size() &&
                    std::equal(got.begin(), got.end(), expected.begin(),
                               [](std::int64_t a, std::int64_t b) { return b == -1 || a == b; });
  if (!same) {
    return invalid_argument(concat(operand.name, " must have shape ", extents_text(expected),
                                   ", got ", extents_text(got)));
  }
  for (std::size_t i = 0; i < dims.size(); ++i) {
    if (is_letter(dims[i]) && expected[i] == -1) JFA_CHECK_OK(learn(operand, dims[i], got[i]));
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
  }
  if (got == expected) return {};
  return invalid_argument(concat(operand.name, " must be ", expected, ", got ", got));
}

// Some dimensions follow from others.
Status Extents::learn(const Operand& operand, char letter, std::int64_t extent) {
  extents_[index(letter)] = extent;
  switch (letter) {
    case 's':
      if (types_.descale_each_block) extents_[index('m')] = num_blocks(extent);
      return {};
    case 't':
      if (types_.descale_each_block) extents_[index('n')] = num_blocks(extent);
      extents_[index('p')] = padded_keys(extent);
      return {};
    case 'm':
    case 'n': {
      const std::int64_t blocks = num_blocks((*this)[letter == 'm' ? 's' : 't']);
      if (extent == 1 || extent == blocks) return {};
      return invalid_argument(concat(operand.name, " must have 1 or ", blocks,
                                     " scales of a head (one for ", kDescaleBlock, " rows), got ",
                                     extent));
    }
    default:
      return {};
  }
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

StatusOr<Buffers> buffers_of(const xla::ffi::RemainingArgs& args) {
  Buffers buffers;
  for (std::size_t i = 0; i < args.size(); ++i) {
    const auto buffer = args.get<xla::ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return invalid_argument(concat("operand ", i, " must be a buffer"));
    buffers.push_back(*buffer);
  }
  return buffers;
}

StatusOr<Buffers> buffers_of(const xla::ffi::RemainingRets& rets) {
  Buffers buffers;
  for (std::size_t i = 0; i < rets.size(); ++i) {
    auto buffer = rets.get<xla::ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return invalid_argument(concat("result ", i, " must be a buffer"));
    buffers.push_back(**buffer);
  }
  return buffers;
}

Status check_count(const std::vector<std::pair<Operand, bool>>& rows, std::size_t num_buffers,
                   const char* side) {
  std::size_t required = 0, announced = 0;
  for (const auto& [operand, present] : rows) {
    required += !operand.optional;
    announced += operand.optional && present;
  }
  if (num_buffers < required) {
    return invalid_argument(
        concat("the call must have ", required, " ", side, " at least, got ", num_buffers));
  }
  const std::size_t got = num_buffers - required;
  if (got == announced) return {};
  // Of those announced the first that is missing has a name.
  std::size_t seen = 0;
  for (const auto& [operand, present] : rows) {
    if (!operand.optional || !present || seen++ < got) continue;
    return invalid_argument(
        concat("options announce the operand ", operand.name, ", got ", got, " optional ", side));
  }
  return invalid_argument(
      concat("options announce ", announced, " optional ", side, ", got ", got));
}

Status check_aligned(const Operand& operand, std::uintptr_t alignment, const void* address) {
  if (alignment == 0) alignment = alignment_of(operand.element);
  if (reinterpret_cast<std::uintptr_t>(address) % alignment == 0) return {};
  return invalid_argument(
      concat(operand.name, " must be aligned to ", alignment, " bytes, got address ", address));
}

}  // namespace jax_fa3
