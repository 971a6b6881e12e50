#include "ffi/decode.h"

#include <algorithm>
#include <string>
#include <vector>

#include "attention/prepared_value.h"
#include "call/text.h"
#include "ffi/error.h"

namespace jax_fa3 {
namespace {

using xla::ffi::AnyBuffer;
using xla::ffi::DataType;
using Extents = std::vector<std::int64_t>;

template <class Range>
std::string extents_text(const Range& extents) {
  std::string text = "[";
  for (const std::int64_t extent : extents) {
    text += concat(text.size() > 1 ? ", " : "", extent);
  }
  return text + "]";
}

// Extents of -1 match anything.
Status expect(const char* name, const AnyBuffer& buffer, DataType dtype, const Extents& extents) {
  if (buffer.element_type() != dtype) {
    return invalid_argument(concat(name, " must be ", dtype, ", got ", buffer.element_type()));
  }
  const auto got = buffer.dimensions();
  const bool same = got.size() == extents.size() &&
                    std::equal(got.begin(), got.end(), extents.begin(),
                               [](std::int64_t a, std::int64_t b) { return b == -1 || a == b; });
  if (same) return {};
  return invalid_argument(
      concat(name, " must have shape ", extents_text(extents), ", got ", extents_text(got)));
}

StatusOr<Shape> decode_shape(const AnyBuffer& query, const AnyBuffer& key, const AnyBuffer& value) {
  const DataType type = query.element_type();
  if (type != DataType::BF16 && type != DataType::F16) {
    return invalid_argument(concat("query must be BF16 or F16, got ", type));
  }
  JFA_CHECK_OK(expect("query", query, type, {-1, -1, -1, -1}));
  JFA_CHECK_OK(expect("key", key, type, {query.dimensions()[0], -1, -1, query.dimensions()[3]}));
  const auto q = query.dimensions();
  const auto k = key.dimensions();
  JFA_CHECK_OK(expect("value", value, type, {q[0], k[1], k[2], -1}));
  Shape shape;
  shape.dtype = type == DataType::BF16 ? DType::kBF16 : DType::kFP16;
  shape.batch = q[0];
  shape.seqlen_q = q[1];
  shape.seqlen_k = k[1];
  shape.num_heads_q = q[2];
  shape.num_heads_kv = k[2];
  shape.head_dim = q[3];
  shape.head_dim_v = value.dimensions()[3];
  return shape;
}

StatusOr<DType> decode_16_bit(const char* name, const AnyBuffer& buffer) {
  const DataType type = buffer.element_type();
  if (type == DataType::BF16) return DType::kBF16;
  if (type == DataType::F16) return DType::kFP16;
  return invalid_argument(concat(name, " must be BF16 or F16, got ", type));
}

// The scales of query or key: [batch, heads, 1] or one for each 128 rows.
Status decode_descale(const char* name, const AnyBuffer& buffer, std::int64_t batch,
                      std::int64_t heads, std::int64_t seqlen, const float** pointer,
                      std::int64_t* count) {
  JFA_CHECK_OK(expect(name, buffer, DataType::F32, {batch, heads, -1}));
  *count = buffer.dimensions()[2];
  const std::int64_t blocks = ceil_div<std::int64_t>(seqlen, kDescaleBlock);
  if (*count != 1 && *count != blocks) {
    return invalid_argument(concat(name, " must have 1 or ", blocks, " scales of a head (one for ",
                                   kDescaleBlock, " rows), got ", *count));
  }
  *pointer = static_cast<const float*>(buffer.untyped_data());
  return {};
}

// Takes the optional operands one after the other.
class Optionals {
 public:
  explicit Optionals(const xla::ffi::RemainingArgs& args) : args_(args) {}

  template <class T>
  Status take(bool present, const char* name, DataType dtype, const Extents& extents,
              const T** pointer) {
    if (!present) return {};
    if (next_ >= args_.size()) {
      return invalid_argument(concat("options announce the operand ", name, ", got ", args_.size(),
                                     " optional operands"));
    }
    const auto buffer = args_.get<AnyBuffer>(next_++);
    if (!buffer.has_value()) return invalid_argument(concat(name, " must be a buffer"));
    JFA_CHECK_OK(expect(name, *buffer, dtype, extents));
    *pointer = static_cast<const T*>(buffer->untyped_data());
    return {};
  }

  Status finish() const {
    if (next_ == args_.size()) return {};
    return invalid_argument(
        concat("options announce ", next_, " optional operands, got ", args_.size()));
  }

 private:
  const xla::ffi::RemainingArgs& args_;
  std::size_t next_ = 0;
};

template <class AnyOptions>
Status decode_lengths(Optionals& optionals, const AnyOptions& options, std::int64_t batch,
                      IndexArrays* index) {
  JFA_CHECK_OK(optionals.take(options.has_query_lengths, "query_seq_lengths", DataType::S32,
                              {batch}, &index->query_lengths));
  return optionals.take(options.has_key_lengths, "key_value_seq_lengths", DataType::S32, {batch},
                        &index->key_lengths);
}

Status decode_index(Optionals& optionals, const Options& options, std::int64_t batch,
                    IndexArrays* index) {
  JFA_CHECK_OK(decode_lengths(optionals, options, batch, index));
  JFA_CHECK_OK(optionals.take(options.has_query_offset, "query_offset", DataType::S32, {batch},
                              &index->query_offset));
  return optionals.finish();
}

}  // namespace

StatusOr<ForwardProblem> decode_forward(const ForwardBuffers& buffers, const Options& options) {
  JFA_TRY(s, decode_shape(buffers.query, buffers.key, buffers.value));
  const DataType type = buffers.query.element_type();
  JFA_CHECK_OK(
      expect("out", buffers.out, type, {s.batch, s.seqlen_q, s.num_heads_q, s.head_dim_v}));
  JFA_CHECK_OK(expect("lse", buffers.lse, DataType::F32, {s.batch, s.num_heads_q, s.seqlen_q}));
  JFA_CHECK_OK(expect("tile_counter", buffers.tile_counter, DataType::S32, {1}));
  if (options.has_dlse) return invalid_argument("has_dlse must be false in the forward pass");

  ForwardProblem problem;
  problem.shape = s;
  problem.mask = mask_of(options);
  problem.softmax_scale = options.scale;
  problem.rescale_threshold = options.rescale_threshold;
  problem.query = buffers.query.untyped_data();
  problem.key = buffers.key.untyped_data();
  problem.value = buffers.value.untyped_data();
  problem.out = buffers.out.untyped_data();
  problem.lse = static_cast<float*>(buffers.lse.untyped_data());
  problem.tile_counter = static_cast<std::int32_t*>(buffers.tile_counter.untyped_data());
  Optionals optionals(buffers.rest);
  JFA_CHECK_OK(decode_index(optionals, options, s.batch, &problem.index));
  return problem;
}

StatusOr<ForwardFloat8Problem> decode_forward_float8(const ForwardFloat8Buffers& buffers,
                                                     const Options& options,
                                                     bool value_is_prepared) {
  ForwardFloat8Problem problem;
  Shape& s = problem.shape;
  constexpr DataType kType = DataType::F8E4M3FN;
  JFA_CHECK_OK(expect("query", buffers.query, kType, {-1, -1, -1, -1}));
  const auto q = buffers.query.dimensions();
  JFA_CHECK_OK(expect("key", buffers.key, kType, {q[0], -1, -1, q[3]}));
  const auto k = buffers.key.dimensions();
  const std::int64_t padded = padded_keys(k[1]);
  JFA_CHECK_OK(
      expect("value", buffers.value, kType,
             value_is_prepared ? Extents{q[0], k[2], -1, padded} : Extents{q[0], k[1], k[2], -1}));
  JFA_TRY(out_type, decode_16_bit("out", buffers.out));
  s.dtype = out_type;
  s.batch = q[0];
  s.seqlen_q = q[1];
  s.seqlen_k = k[1];
  s.num_heads_q = q[2];
  s.num_heads_kv = k[2];
  s.head_dim = q[3];
  s.head_dim_v = buffers.value.dimensions()[value_is_prepared ? 2 : 3];
  JFA_CHECK_OK(expect("out", buffers.out, buffers.out.element_type(),
                      {s.batch, s.seqlen_q, s.num_heads_q, s.head_dim_v}));
  JFA_CHECK_OK(expect("lse", buffers.lse, DataType::F32, {s.batch, s.num_heads_q, s.seqlen_q}));
  JFA_CHECK_OK(expect("tile_counter", buffers.tile_counter, DataType::S32, {1}));
  JFA_CHECK_OK(expect("workspace", buffers.workspace, DataType::U8, {-1}));
  JFA_CHECK_OK(decode_descale("query_descale", buffers.query_descale, s.batch, s.num_heads_q,
                              s.seqlen_q, &problem.query_descale, &problem.query_descales));
  JFA_CHECK_OK(decode_descale("key_descale", buffers.key_descale, s.batch, s.num_heads_kv,
                              s.seqlen_k, &problem.key_descale, &problem.key_descales));
  JFA_CHECK_OK(
      expect("value_descale", buffers.value_descale, DataType::F32, {s.batch, s.num_heads_kv}));
  if (options.has_dlse) return invalid_argument("has_dlse must be false in the forward pass");

  problem.mask = mask_of(options);
  problem.softmax_scale = options.scale;
  problem.value_is_prepared = value_is_prepared;
  problem.query = buffers.query.untyped_data();
  problem.key = buffers.key.untyped_data();
  problem.value = buffers.value.untyped_data();
  problem.value_descale = static_cast<const float*>(buffers.value_descale.untyped_data());
  problem.out = buffers.out.untyped_data();
  problem.lse = static_cast<float*>(buffers.lse.untyped_data());
  problem.tile_counter = static_cast<std::int32_t*>(buffers.tile_counter.untyped_data());
  problem.workspace = buffers.workspace.untyped_data();
  Optionals optionals(buffers.rest);
  JFA_CHECK_OK(decode_index(optionals, options, s.batch, &problem.index));
  return problem;
}

StatusOr<BackwardProblem> decode_backward(const BackwardBuffers& buffers, const Options& options) {
  JFA_TRY(s, decode_shape(buffers.query, buffers.key, buffers.value));
  const DataType type = buffers.query.element_type();
  const Extents query{s.batch, s.seqlen_q, s.num_heads_q, s.head_dim};
  const Extents key{s.batch, s.seqlen_k, s.num_heads_kv, s.head_dim};
  const Extents value{s.batch, s.seqlen_k, s.num_heads_kv, s.head_dim_v};
  const Extents out{s.batch, s.seqlen_q, s.num_heads_q, s.head_dim_v};
  const Extents rows{s.batch, s.num_heads_q, s.seqlen_q};
  JFA_CHECK_OK(expect("out", buffers.out, type, out));
  JFA_CHECK_OK(expect("lse", buffers.lse, DataType::F32, rows));
  JFA_CHECK_OK(expect("dout", buffers.dout, type, out));
  JFA_CHECK_OK(expect("dquery", buffers.dquery, type, query));
  JFA_CHECK_OK(expect("dkey", buffers.dkey, type, key));
  JFA_CHECK_OK(expect("dvalue", buffers.dvalue, type, value));

  BackwardProblem problem;
  problem.shape = s;
  problem.mask = mask_of(options);
  problem.softmax_scale = options.scale;
  problem.deterministic = options.deterministic;
  problem.query = buffers.query.untyped_data();
  problem.key = buffers.key.untyped_data();
  problem.value = buffers.value.untyped_data();
  problem.out = buffers.out.untyped_data();
  problem.lse = static_cast<const float*>(buffers.lse.untyped_data());
  problem.dout = buffers.dout.untyped_data();
  problem.dquery = buffers.dquery.untyped_data();
  problem.dkey = buffers.dkey.untyped_data();
  problem.dvalue = buffers.dvalue.untyped_data();
  problem.workspace = buffers.workspace.untyped_data();
  Optionals optionals(buffers.rest);
  JFA_CHECK_OK(optionals.take(options.has_dlse, "dlse", DataType::F32, rows, &problem.dlse));
  JFA_CHECK_OK(decode_index(optionals, options, s.batch, &problem.index));
  return problem;
}

StatusOr<QuantizeProblem> decode_quantize(const QuantizeBuffers& buffers,
                                          const QuantizeOptions& options) {
  JFA_TRY(s, decode_shape(buffers.query, buffers.key, buffers.value));
  if (options.back && options.prepare_value) {
    return invalid_argument("prepare_value must be false with back, got true");
  }
  const DataType type = options.back ? buffers.query.element_type() : DataType::F8E4M3FN;
  const Extents value{s.batch, s.seqlen_k, s.num_heads_kv, s.head_dim_v};
  const Extents prepared{s.batch, s.num_heads_kv, s.head_dim_v, padded_keys(s.seqlen_k)};
  const auto blocks = [](std::int64_t seqlen) {
    return ceil_div<std::int64_t>(seqlen, kDescaleBlock);
  };
  JFA_CHECK_OK(expect("query_out", buffers.query_out, type,
                      {s.batch, s.seqlen_q, s.num_heads_q, s.head_dim}));
  JFA_CHECK_OK(
      expect("key_out", buffers.key_out, type, {s.batch, s.seqlen_k, s.num_heads_kv, s.head_dim}));
  JFA_CHECK_OK(
      expect("value_out", buffers.value_out, type, options.prepare_value ? prepared : value));
  JFA_CHECK_OK(expect("query_descale", buffers.query_descale, DataType::F32,
                      {s.batch, s.num_heads_q, blocks(s.seqlen_q)}));
  JFA_CHECK_OK(expect("key_descale", buffers.key_descale, DataType::F32,
                      {s.batch, s.num_heads_kv, blocks(s.seqlen_k)}));
  JFA_CHECK_OK(
      expect("value_descale", buffers.value_descale, DataType::F32, {s.batch, s.num_heads_kv}));

  QuantizeProblem problem;
  problem.shape = s;
  problem.seed = options.seed;
  problem.back = options.back;
  problem.prepare_value = options.prepare_value;
  problem.query = buffers.query.untyped_data();
  problem.key = buffers.key.untyped_data();
  problem.value = buffers.value.untyped_data();
  problem.query_out = buffers.query_out.untyped_data();
  problem.key_out = buffers.key_out.untyped_data();
  problem.value_out = buffers.value_out.untyped_data();
  problem.query_descale = static_cast<float*>(buffers.query_descale.untyped_data());
  problem.key_descale = static_cast<float*>(buffers.key_descale.untyped_data());
  problem.value_descale = static_cast<float*>(buffers.value_descale.untyped_data());
  Optionals optionals(buffers.rest);
  JFA_CHECK_OK(decode_lengths(optionals, options, s.batch, &problem.index));
  JFA_CHECK_OK(optionals.finish());
  return problem;
}

}  // namespace jax_fa3
