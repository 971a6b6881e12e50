// From buffers to a Problem on the host: what decode and validate take and what they refuse.
#include "ffi/decode.h"

#include <algorithm>
#include <deque>
#include <vector>

#include "attention/dense_mask.h"
#include "check.h"
#include "ffi/handler.h"
#include "kernels/backward/call.h"
#include "kernels/dense_mask/call.h"
#include "kernels/forward/call.h"
#include "kernels/forward_float8/call.h"
#include "kernels/quantize/call.h"
#include "kernels/visibility/call.h"

namespace jax_fa3 {
namespace {

namespace ffi = xla::ffi;
using Dims = std::vector<std::int64_t>;

constexpr Device kHopper{9, 0, 132};

struct Buffer {
  const char* name;
  ffi::DataType dtype;
  Dims dims;
  std::uintptr_t address = 0;  // 0: some address, aligned
};

// A call's buffers, whose memory is never touched, as XLA hands them over.
class Frame {
 public:
  explicit Frame(const std::vector<Buffer>& buffers) : given_(buffers) {
    for (const Buffer& given : given_) {
      XLA_FFI_Buffer buffer{};
      buffer.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
      buffer.dtype = static_cast<XLA_FFI_DataType>(given.dtype);
      buffer.rank = static_cast<std::int64_t>(given.dims.size());
      buffer.dims = const_cast<std::int64_t*>(given.dims.data());
      next_address_ += 1024;
      buffer.data = reinterpret_cast<void*>(given.address ? given.address : next_address_);
      buffers_.push_back(buffer);
      pointers_.push_back(&buffers_.back());
    }
    arg_types_.assign(pointers_.size(), XLA_FFI_ArgType_BUFFER);
    ret_types_.assign(pointers_.size(), XLA_FFI_RetType_BUFFER);
  }

  ffi::RemainingArgs args() {
    args_.struct_size = XLA_FFI_Args_STRUCT_SIZE;
    args_.size = static_cast<std::int64_t>(pointers_.size());
    args_.types = arg_types_.data();
    args_.args = pointers_.data();
    return ffi::RemainingArgs(&args_, 0);
  }
  ffi::RemainingRets rets() {
    rets_.struct_size = XLA_FFI_Rets_STRUCT_SIZE;
    rets_.size = static_cast<std::int64_t>(pointers_.size());
    rets_.types = ret_types_.data();
    rets_.rets = pointers_.data();
    return ffi::RemainingRets(&rets_, 0);
  }

 private:
  const std::vector<Buffer> given_;
  std::uintptr_t next_address_ = 1 << 20;
  std::deque<XLA_FFI_Buffer> buffers_;
  std::vector<void*> pointers_;
  std::vector<XLA_FFI_ArgType> arg_types_;
  std::vector<XLA_FFI_RetType> ret_types_;
  XLA_FFI_Args args_{};
  XLA_FFI_Rets rets_{};
};

std::string names_of(const std::vector<Buffer>& buffers) {
  std::string names;
  for (const Buffer& buffer : buffers) names += concat(names.empty() ? "" : " ", buffer.name);
  return names;
}

template <class Family>
StatusOr<typename Family::Problem> decoded(std::vector<Buffer> operands,
                                           const std::vector<Buffer>& optionals,
                                           const std::vector<Buffer>& results,
                                           typename Family::Attributes attributes) {
  operands.insert(operands.end(), optionals.begin(), optionals.end());
  const std::string operand_names = names_of(operands), result_names = names_of(results);
  attributes.operands = Names(operand_names);
  attributes.results = Names(result_names);
  Frame args(operands), rets(results);
  return decode<Family>(args.args(), rets.rets(), attributes, Addresses::kChecked);
}

constexpr auto kF32 = ffi::DataType::F32;
constexpr auto kS32 = ffi::DataType::S32;

struct Call {
  ffi::DataType dtype = ffi::DataType::BF16;
  Dims query{2, 100, 6, 64};
  Dims key{2, 90, 3, 64};
  Dims value{2, 90, 3, 64};
  Dims out{2, 100, 6, 64};
  Dims lse{2, 6, 100};
  Dims counter{1};
  Dims dbias;  // none: no such result
  ffi::DataType lse_dtype = kF32;
  std::vector<Buffer> optionals;
  Options options{0.125f, kUnbounded, 0, 0, 8.f, 0.f, 0, false};
  std::uintptr_t query_address = 0;
  std::uintptr_t workspace_address = 0;
  bool has_lse = true;

  StatusOr<ForwardProblem> forward() const {
    std::vector<Buffer> results{
        {"out", dtype, out}, {"lse", lse_dtype, lse}, {"tile_counter", kS32, counter}};
    if (!has_lse) results.erase(results.begin() + 1);
    return decoded<ForwardCall>(
        {{"query", dtype, query, query_address}, {"key", dtype, key}, {"value", dtype, value}},
        optionals, results, {{}, {}, options});
  }

  StatusOr<BackwardProblem> backward() const {
    std::vector<Buffer> results{
        {"dquery", dtype, query}, {"dkey", dtype, key}, {"dvalue", dtype, value}};
    if (!dbias.empty()) results.push_back({"dbias", dtype, dbias});
    results.push_back({"workspace", ffi::DataType::U8, {4096}, workspace_address});
    return decoded<BackwardCall>({{"query", dtype, query, query_address},
                                  {"key", dtype, key},
                                  {"value", dtype, value},
                                  {"out", dtype, out},
                                  {"lse", lse_dtype, lse},
                                  {"dout", dtype, out}},
                                 optionals, results, {{}, {}, options});
  }
};

void decodes() {
  Call call;
  call.dtype = ffi::DataType::F16;
  call.optionals = {{"query_seq_lengths", kS32, {2}}, {"query_offset", kS32, {2}}};
  const auto forward = call.forward();
  CHECK_DETAIL(forward.ok(), forward.status().message());
  const ForwardProblem& problem = forward.value();
  CHECK(problem.shape.dtype == DType::kFP16);
  CHECK(problem.shape.batch == 2 && problem.shape.seqlen_q == 100 && problem.shape.seqlen_k == 90);
  CHECK(problem.shape.num_heads_q == 6 && problem.shape.num_heads_kv == 3);
  CHECK(problem.shape.head_dim == 64 && problem.shape.head_dim_v == 64);
  CHECK(problem.index.query_lengths && !problem.index.key_lengths && problem.index.query_offset);
  CHECK(problem.mask.window_left == kUnbounded && problem.mask.window_right == 0);
  CHECK(validate<ForwardCall>(problem, kHopper).ok());

  call.options.deterministic = true;
  call.optionals.insert(call.optionals.begin(), {"dlse", kF32, {2, 6, 100}});
  const auto backward = call.backward();
  CHECK_DETAIL(backward.ok(), backward.status().message());
  CHECK(backward.value().dlse && backward.value().index.query_lengths);
  CHECK(backward.value().deterministic);
  CHECK(validate<BackwardCall>(backward.value(), kHopper).ok());
}

template <class Change>
Call with(const Change& change) {
  Call call;
  change(call);
  return call;
}

void refuses_buffers() {
  const auto refuses = [](const Call& call, const char* part) {
    CHECK_REFUSES(call.forward().status(), part);
    CHECK_REFUSES(call.backward().status(), part);
  };
  refuses(with([](Call& c) { c.dtype = ffi::DataType::F32; }),
          "query must be BF16 or F16, got F32");
  refuses(with([](Call& c) { c.query = {100, 6, 64}; }), "query must have shape [-1, -1, -1, -1]");
  refuses(with([](Call& c) {
            c.key = {3, 90, 3, 64};
          }),
          "key must have shape [2, -1, -1, 64], got [3, 90, 3, 64]");
  refuses(with([](Call& c) { c.value = {2, 91, 3, 64}; }), "value must have shape [2, 90, 3, -1]");
  refuses(with([](Call& c) {
            c.out = {2, 100, 6, 72};
          }),
          "out must have shape [2, 100, 6, 64], got [2, 100, 6, 72]");
  refuses(with([](Call& c) { c.lse = {2, 100, 6}; }), "lse must have shape [2, 6, 100]");
  refuses(with([](Call& c) { c.lse_dtype = ffi::DataType::BF16; }), "lse must be F32, got BF16");
  const auto refuses_optionals = [&](const std::vector<Buffer>& optionals, const char* part) {
    refuses(with([&](Call& c) { c.optionals = optionals; }), part);
  };
  refuses_optionals({{"mask", kS32, {2}}}, "operands must not have mask in its place, got 'query");
  refuses_optionals({{"query_offset", kS32, {2}}, {"query_seq_lengths", kS32, {2}}},
                    "operands must not have query_seq_lengths in its place, got 'query key value");
  refuses_optionals({{"query_offset", kS32, {2}}, {"query_offset", kS32, {2}}},
                    "operands must not have query_offset in its place");
  refuses_optionals({{"", kS32, {2}}}, "operands names ");
  refuses_optionals({{"key_value_seq_lengths", ffi::DataType::S64, {2}}},
                    "key_value_seq_lengths must be S32, got S64");
  refuses_optionals({{"query_offset", kS32, {3}}}, "query_offset must have shape [2], got [3]");
  refuses_optionals({{"query_seq_lengths", kS32, {2}, 4098}},
                    "query_seq_lengths must be aligned to 4 bytes");
  CHECK_REFUSES(with([](Call& c) {
                  c.optionals = {{"dlse", kF32, {2, 6, 100}}};
                })
                    .forward()
                    .status(),
                "operands must not have dlse in its place");
  refuses(with([](Call& c) { c.query_address = 4104; }), "query must be aligned to 16 bytes");
  CHECK_REFUSES(with([](Call& c) { c.workspace_address = 4112; }).backward().status(),
                "workspace must be aligned to 256 bytes");
  CHECK_REFUSES(with([](Call& c) { c.has_lse = false; }).forward().status(),
                "results must have lse in its place, got 'out tile_counter'");
}

// Names and buffers that do not fit each other.
void refuses_other_numbers() {
  const std::vector<Buffer> masks(2, {"mask", ffi::DataType::PRED, {1, 1, 8, 8}});
  Frame args(masks), rets({});
  const auto refuses = [&](const char* operands, const char* part) {
    const DenseMaskAttributes attributes{Names(operands), Names("mask_table")};
    CHECK_REFUSES(
        decode<DenseMaskCall>(args.args(), rets.rets(), attributes, Addresses::kChecked).status(),
        part);
  };
  refuses("mask", "operands names 1 arrays, got 2: 'mask'");
  refuses("mask mask", "operands must not have mask in its place, got 'mask mask'");
  refuses("mask ", "operands names 1 arrays, got 2");
  refuses(" mask", "operands must have mask in its place, got ' mask'");
  refuses("", "operands must have mask in its place, got ''");
}

void refuses_values() {
  const auto refuses = [](const Call& call, const char* part, Device device = kHopper) {
    CHECK_REFUSES(validate<ForwardCall>(call.forward().value(), device), part);
    CHECK_REFUSES(validate<BackwardCall>(call.backward().value(), device), part);
  };
  refuses(Call(), "compute capability 9.0 (H100, H200), got 8.6", {8, 6, 80});
  refuses(Call(), "got 10.0", {10, 0, 148});
  const auto refuses_options = [](const Call& call, const char* part) {
    CHECK_REFUSES(call.forward().status(), part);
    CHECK_REFUSES(call.backward().status(), part);
  };
  refuses_options(with([](Call& c) { c.options.scale = 0; }),
                  "scale must be positive and finite, got 0");
  refuses_options(with([](Call& c) { c.options.softcap = -1; }),
                  "softcap must be non-negative and finite, got -1");
  refuses_options(with([](Call& c) { c.options.window_left = -3; }), "window_left");
  refuses(with([](Call& c) { c.key[2] = c.value[2] = 4; }),
          "num_heads_q must be a multiple of num_heads_kv, got 6 and 4");
  refuses(with([](Call& c) { c.query[3] = c.key[3] = c.value[3] = c.out[3] = 36; }),
          "head_dim must be a multiple of 8");
  const Call negative = with([](Call& c) { c.options.rescale_threshold = -1; });
  CHECK_REFUSES(negative.forward().status(), "rescale_threshold must be non-negative");
  CHECK(num_sms_to_fill(kHopper, 0).value() == 132);
  CHECK(num_sms_to_fill(kHopper, 20).value() == 112);
  CHECK(num_sms_to_fill(kHopper, 200).value() == 1);
  CHECK_REFUSES(num_sms_to_fill(kHopper, -1).status(), "sm_margin must be non-negative, got -1");
  CHECK_REFUSES(check_workspace(4097, 4096), "workspace must have 4097 bytes, got 4096");
  CHECK(check_workspace(4096, 4096).ok());
}

struct Float8Call {
  ffi::DataType dtype = ffi::DataType::F8E4M3FN;
  ffi::DataType out_dtype = ffi::DataType::F16;
  Dims query{2, 300, 6, 64};
  Dims key{2, 200, 3, 64};
  Dims value{2, 200, 3, 48};
  Dims query_descale{2, 6, 3};
  Dims key_descale{2, 3, 1};
  Dims value_descale{2, 3};
  Dims out{2, 300, 6, 48};
  bool value_is_prepared = false;
  std::uintptr_t workspace_address = 0;
  std::vector<Buffer> optionals;
  Options options = Call().options;

  StatusOr<ForwardFloat8Problem> decode() const {
    const char* value_name = value_is_prepared ? "prepared_value" : "value";
    return decoded<ForwardFloat8Call>({{"query", dtype, query},
                                       {"key", dtype, key},
                                       {value_name, dtype, value},
                                       {"query_descale", kF32, query_descale},
                                       {"key_descale", kF32, key_descale},
                                       {"value_descale", kF32, value_descale}},
                                      optionals,
                                      {{"out", out_dtype, out},
                                       {"lse", kF32, {2, 6, 300}},
                                       {"tile_counter", kS32, {1}},
                                       {"workspace", ffi::DataType::U8, {4096}, workspace_address}},
                                      {{}, {}, options});
  }
};

void decodes_float8() {
  Float8Call call;
  call.optionals = {{"key_value_seq_lengths", kS32, {2}}};
  const auto plain = call.decode();
  CHECK_DETAIL(plain.ok(), plain.status().message());
  const ForwardFloat8Problem& problem = plain.value();
  CHECK(problem.shape.dtype == DType::kFP16);
  CHECK(problem.shape.seqlen_q == 300 && problem.shape.seqlen_k == 200);
  CHECK(problem.shape.num_heads_q == 6 && problem.shape.num_heads_kv == 3);
  CHECK(problem.shape.head_dim == 64 && problem.shape.head_dim_v == 48);
  CHECK(problem.query_descales == 3 && problem.key_descales == 1);
  CHECK(problem.query_descale && problem.key_descale && problem.value_descale);
  CHECK(problem.index.key_lengths && !problem.index.query_lengths);
  CHECK(!problem.value_is_prepared && problem.workspace);
  CHECK(validate<ForwardFloat8Call>(problem, kHopper).ok());
  CHECK_REFUSES(validate<ForwardFloat8Call>(problem, {10, 0, 148}), "got 10.0");

  call.value_is_prepared = true;
  call.value = {2, 3, 48, 256};
  const auto prepared = call.decode();
  CHECK_DETAIL(prepared.ok(), prepared.status().message());
  CHECK(prepared.value().shape.head_dim_v == 48 && prepared.value().shape.seqlen_k == 200);
}

void refuses_float8() {
  const auto refuses = [](const auto& change, const char* part) {
    Float8Call call;
    change(call);
    CHECK_REFUSES(call.decode().status(), part);
  };
  using C = Float8Call;
  refuses([](C& c) { c.dtype = ffi::DataType::BF16; }, "query must be F8E4M3FN, got BF16");
  refuses([](C& c) { c.out_dtype = ffi::DataType::F32; }, "out must be BF16 or F16, got F32");
  refuses([](C& c) { c.out = {2, 300, 6, 64}; }, "out must have shape [2, 300, 6, 48]");
  refuses([](C& c) { c.value_is_prepared = true; }, "value must have shape [2, 3, -1, 256]");
  refuses(
      [](C& c) {
        c.query_descale = {2, 6, 2};
      },
      "query_descale must have 1 or 3 scales of a head (one for 128 rows), got 2");
  refuses([](C& c) { c.key_descale = {2, 6, 2}; }, "key_descale must have shape [2, 3, -1]");
  refuses([](C& c) { c.value_descale = {2, 3, 1}; }, "value_descale must have shape [2, 3]");
  refuses([](C& c) { c.options.softcap = 1; }, "the float8 kernels have no softcap");
  for (const char* name : {"dlse", "bias", "dense_mask", "sinks", "alibi_slopes"}) {
    refuses([&](C& c) { c.optionals = {{name, kS32, {2}}}; }, "operands must not have ");
  }
  Float8Call call;
  call.workspace_address = 4104;
  CHECK_REFUSES(call.decode().status(), "workspace must be aligned to 16 bytes");
}

struct Rounding {
  ffi::DataType dtype = ffi::DataType::BF16;
  ffi::DataType out_dtype = ffi::DataType::F8E4M3FN;
  Dims query{2, 300, 6, 64};
  Dims key{2, 200, 3, 64};
  Dims value{2, 200, 3, 48};
  Dims value_out{2, 3, 48, 256};
  Dims key_descale{2, 3, 2};
  std::uintptr_t value_address = 0;
  std::vector<Buffer> optionals;
  QuantizeAttributes options{{}, {}, 5, false, true};

  StatusOr<QuantizeProblem> decode() const {
    return decoded<QuantizeCall>(
        {{"query", dtype, query}, {"key", dtype, key}, {"value", dtype, value, value_address}},
        optionals,
        {{"query_out", out_dtype, query},
         {"key_out", out_dtype, key},
         {"value_out", out_dtype, value_out},
         {"query_descale", kF32, {2, 6, 3}},
         {"key_descale", kF32, key_descale},
         {"value_descale", kF32, {2, 3}}},
        options);
  }
};

void decodes_quantize() {
  Rounding call;
  call.optionals = {{"key_value_seq_lengths", kS32, {2}}};
  const auto there = call.decode();
  CHECK_DETAIL(there.ok(), there.status().message());
  CHECK(there.value().shape.seqlen_q == 300 && there.value().shape.head_dim_v == 48);
  CHECK(there.value().seed == 5 && !there.value().back && there.value().prepare_value);
  CHECK(there.value().index.key_lengths && !there.value().index.query_lengths);
  CHECK(validate<QuantizeCall>(there.value(), kHopper).ok());
  CHECK_REFUSES(validate<QuantizeCall>(there.value(), {10, 0, 148}), "got 10.0");

  call.options.prepare_value = false;
  call.value_out = call.value;
  CHECK_DETAIL(call.decode().ok(), call.decode().status().message());

  call.options.back = true;
  call.out_dtype = call.dtype;
  CHECK_DETAIL(call.decode().ok(), call.decode().status().message());
}

void refuses_quantize() {
  const auto refuses = [](const auto& change, const char* part) {
    Rounding call;
    change(call);
    CHECK_REFUSES(call.decode().status(), part);
  };
  using C = Rounding;
  refuses([](C& c) { c.dtype = ffi::DataType::F32; }, "query must be BF16 or F16, got F32");
  refuses([](C& c) { c.out_dtype = c.dtype; }, "query_out must be F8E4M3FN, got BF16");
  refuses([](C& c) { c.options.back = true; }, "prepare_value must be false with back");
  refuses([](C& c) { c.options.back = true, c.options.prepare_value = false; },
          "query_out must be BF16, got F8E4M3FN");
  refuses([](C& c) { c.value_out = c.value; }, "value_out must have shape [2, 3, 48, 256]");
  refuses([](C& c) { c.options.prepare_value = false; }, "value_out must have shape [2, 200, 3,");
  refuses([](C& c) { c.key_descale = {2, 3, 1}; }, "key_descale must have shape [2, 3, 2]");
  refuses(
      [](C& c) {
        c.optionals = {{"query_offset", kS32, {2}}};
      },
      "operands must not have query_offset in its place");
  Rounding call;
  call.value_address = 4104;
  CHECK_REFUSES(call.decode().status(), "value must be aligned to 16 bytes");

  const auto refuses_shape = [](const auto& change, const char* part) {
    Shape shape = Rounding().decode().value().shape;
    change(shape);
    CHECK_REFUSES(check_quantize(shape), part);
  };
  refuses_shape([](Shape& s) { s.head_dim = 72; }, "head_dim must be a multiple of 16, got 72");
  refuses_shape([](Shape& s) { s.head_dim_v = 264; }, "head_dim_v must be a multiple of 8 in");
  refuses_shape([](Shape& s) { s.seqlen_k = 0; }, "seqlen_k must be positive, got 0");
  refuses_shape([](Shape& s) { s.batch = 1 << 28; }, "must be below 2^31");
}

// Tables of row intervals, of the words that 100 rows and 90 keys need.
constexpr std::int64_t kWords = 4 + 200 + 4 * 2 + 4 * 2 + 180;

void decodes_row_intervals() {
  const auto strides = [](const Dims& table) {
    Call call;
    call.optionals = {{"visibility", kS32, table}};
    const auto forward = call.forward();
    CHECK_DETAIL(forward.ok(), forward.status().message());
    const IndexArrays& index = forward.value().index;
    CHECK(index.visibility && forward.value().presence.any && forward.value().presence.visibility);
    return std::pair(index.visibility_batch_stride, index.visibility_head_stride);
  };
  CHECK(strides({1, 1, kWords}) == std::pair(std::int64_t{0}, std::int64_t{0}));
  CHECK(strides({2, 1, kWords}) == std::pair(kWords, std::int64_t{0}));
  CHECK(strides({1, 6, kWords}) == std::pair(std::int64_t{0}, kWords));
  CHECK(strides({2, 6, kWords}) == std::pair(6 * kWords, kWords));

  const auto refuses = [](const Buffer& table, const char* part) {
    Call call;
    call.optionals = {table};
    CHECK_REFUSES(call.forward().status(), part);
    CHECK_REFUSES(call.backward().status(), part);
  };
  refuses({"visibility", kS32, {3, 1, kWords}}, "visibility must have 1 or 2 sequences, got 3");
  refuses({"visibility", kS32, {1, 3, kWords}}, "visibility must have 1 or 6 heads, got 3");
  refuses({"visibility", kS32, {1, 1, kWords + 4}}, "visibility must have shape [-1, -1, 400]");
  refuses({"visibility", kF32, {1, 1, kWords}}, "visibility must be S32, got F32");
  refuses({"visibility", kS32, {1, 1, kWords}, 4104}, "visibility must be aligned to 16 bytes");
}

// Dense arrays, of 100 rows and 90 keys.
constexpr std::int64_t kBiasKeys = 96;
constexpr std::int64_t kMaskWords = 2 * 2 + 100 * 3 + 90 * 4 + 8;  // a plane with each row
constexpr std::int64_t kMaskWordsOfOneRow = 2 + 3 + 90 + 8;

bool same(const Broadcast& a, const Broadcast& b) {
  return a.sequences == b.sequences && a.heads == b.heads && a.rows == b.rows;
}

void decodes_dense_arrays() {
  Call call;
  call.query[0] = call.key[0] = call.value[0] = call.out[0] = call.lse[0] = 4;
  const auto decodes = [&](const Dims& bias, const Dims& mask, const Broadcast& bias_shape,
                           const Broadcast& mask_shape) {
    call.optionals = {{"visibility", kS32, {1, 1, kWords}},
                      {"bias", call.dtype, bias},
                      {"dense_mask", kS32, mask}};
    const auto forward = call.forward();
    CHECK_DETAIL(forward.ok(), forward.status().message());
    const ForwardProblem& problem = forward.value();
    CHECK(problem.index.visibility && problem.dense.bias && problem.dense.mask);
    CHECK(problem.presence.any && problem.presence.visibility);
    CHECK(problem.presence.variant == Variant::kBias);
    CHECK(same(problem.dense.bias_shape, bias_shape) && same(problem.dense.mask_shape, mask_shape));
    CHECK(validate<ForwardCall>(problem, kHopper).ok());

    for (const bool has_dbias : {false, true}) {
      call.dbias = has_dbias ? bias : Dims();
      const auto backward = call.backward();
      CHECK_DETAIL(backward.ok(), backward.status().message());
      const BackwardProblem& problem = backward.value();
      CHECK((problem.dbias != nullptr) == has_dbias && problem.workspace);
      CHECK(same(problem.dense.bias_shape, bias_shape));
      CHECK(validate<BackwardCall>(problem, kHopper).ok());
    }
    call.dbias = {};
  };
  decodes({4, 6, 100, kBiasKeys}, {4, 6, kMaskWords}, {4, 6, 100}, {4, 6, 100});
  decodes({1, 6, 100, kBiasKeys}, {2, 1, kMaskWords}, {1, 6, 100}, {2, 1, 100});
  decodes({2, 1, 1, kBiasKeys}, {1, 1, kMaskWordsOfOneRow}, {2, 1, 1}, {1, 1, 1});

  // A bias alone does not make tiles differ in length.
  call.optionals = {{"bias", call.dtype, {1, 1, 1, kBiasKeys}}};
  const ForwardProblem problem = call.forward().value();
  CHECK(problem.presence.variant == Variant::kBias);
  CHECK(!problem.presence.any && !problem.dense.mask);
  CHECK(Call().forward().value().presence.variant == Variant::kPlain);
}

void refuses_dense_arrays() {
  const auto refuses = [](const Call& call, const char* part) {
    CHECK_REFUSES(call.forward().status(), part);
    CHECK_REFUSES(call.backward().status(), part);
  };
  const auto refuses_bias = [&](const Buffer& bias, const char* part) {
    refuses(with([&](Call& c) { c.optionals = {bias}; }), part);
  };
  constexpr auto kBF16 = ffi::DataType::BF16;
  refuses_bias({"bias", kF32, {2, 6, 100, kBiasKeys}}, "bias must be BF16, got F32");
  refuses_bias({"bias", kBF16, {6, 100, kBiasKeys}}, "bias must have shape [-1, -1, -1, 96]");
  refuses_bias({"bias", kBF16, {2, 6, 100, 90}}, "got [2, 6, 100, 90]");
  refuses_bias({"bias", kBF16, {2, 6, 100, 1}}, "got [2, 6, 100, 1]");
  refuses_bias({"bias", kBF16, {3, 6, 100, kBiasKeys}},
               "bias must have a number of sequences that divides 2, got 3");
  refuses_bias({"bias", kBF16, {0, 6, 100, kBiasKeys}}, "that divides 2, got 0");
  refuses_bias({"bias", kBF16, {2, 3, 100, kBiasKeys}}, "bias must have 1 or 6 heads, got 3");
  refuses_bias({"bias", kBF16, {2, 6, 50, kBiasKeys}}, "bias must have 1 or 100 rows, got 50");
  refuses_bias({"bias", kBF16, {2, 6, 100, kBiasKeys}, 4104}, "bias must be aligned to 16 bytes");

  const auto refuses_mask = [&](const Buffer& mask, const char* part) {
    refuses(with([&](Call& c) { c.optionals = {mask}; }), part);
  };
  refuses_mask({"dense_mask", ffi::DataType::PRED, {2, 6, kMaskWords}},
               "dense_mask must be S32, got PRED");
  refuses_mask({"dense_mask", kS32, {3, 6, kMaskWords}},
               "dense_mask must have a number of sequences that divides 2, got 3");
  refuses_mask({"dense_mask", kS32, {2, 2, kMaskWords}},
               "dense_mask must have 1 or 6 heads, got 2");
  refuses_mask({"dense_mask", kS32, {2, 6, kMaskWords + 1}},
               "dense_mask must have 103 words of one row or 672 of 100 rows, got 673");
  refuses_mask({"dense_mask", kS32, {2, 6, kMaskWords}, 4098},
               "dense_mask must be aligned to 4 bytes");

  Call call;
  call.dbias = {1, 6, 100, kBiasKeys};
  CHECK_REFUSES(call.backward().status(), "operands must have bias with dbias");
  call.optionals = {{"bias", kBF16, {1, 6, 100, kBiasKeys}}};
  CHECK(call.backward().ok());
  call.dbias = {1, 1, 100, kBiasKeys};
  CHECK_REFUSES(call.backward().status(), "dbias must have shape [1, 6, 100, 96]");

  // A kernel is for one variant.
  const char* one_variant = "no kernel has two of a dense array, softcap and alibi_slopes";
  call.options.softcap = 1;
  CHECK_REFUSES(call.forward().status(), one_variant);
  call.optionals = {{"alibi_slopes", kF32, {1, 6}}};
  CHECK_REFUSES(call.backward().status(), one_variant);
  call.options.softcap = 0;
  call.optionals.insert(call.optionals.begin(), {"dense_mask", kS32, {1, 1, kMaskWords}});
  CHECK_REFUSES(call.forward().status(), one_variant);

  constexpr std::int64_t kLong = 1 << 18;
  const std::int64_t words = DenseMaskLayout{kLong, kLong}.words();
  const Call longer = with([&](Call& c) {
    c.query[1] = c.key[1] = c.value[1] = c.out[1] = c.lse[2] = kLong;
    c.optionals = {{"dense_mask", kS32, {1, 1, words}}};
  });
  CHECK_REFUSES(validate<ForwardCall>(longer.forward().value(), kHopper),
                "dense_mask must have less than 2^31 words for each sequence and head");
  CHECK_REFUSES(validate<BackwardCall>(longer.backward().value(), kHopper), "less than 2^31 words");
}

struct Making {
  VisibilityAttributes options{{}, {}, 100, 90, 0, 0, kUnbounded, kUnbounded};
  std::vector<Buffer> optionals;
  Dims result{2, 3, kWords};
  std::int64_t workspace_bytes = 2 * 3 * sizeof(ChunkSummary);
  std::uintptr_t workspace_address = 0;

  StatusOr<VisibilityProblem> decode() const {
    return decoded<VisibilityCall>(
        {}, optionals,
        {{"visibility", kS32, result},
         {"workspace", ffi::DataType::U8, {workspace_bytes}, workspace_address}},
        options);
  }
};

void decodes_visibility() {
  Making call;
  call.options.attention_chunk = 7;
  call.optionals = {{"query_segment_ids", kS32, {2, 100}},
                    {"key_value_segment_ids", kS32, {2, 90}},
                    {"kv_end", kS32, {2, 3, 100}},
                    {"cu_seqlens_q", kS32, {2, 5}},
                    {"cu_seqlens_k", kS32, {2, 5}}};
  const auto problem = call.decode();
  CHECK_DETAIL(problem.ok(), problem.status().message());
  CHECK(problem.value().query_ids && problem.value().key_ids && problem.value().kv_end);
  CHECK(!problem.value().kv_start && problem.value().query_ends && problem.value().key_ends);
  CHECK(problem.value().num_ends == 5 && problem.value().chunk == 7);
  CHECK(problem.value().shape.batch == 2 && problem.value().shape.num_heads_q == 3);
  CHECK(problem.value().shape.seqlen_q == 100 && problem.value().shape.seqlen_k == 90);
  CHECK(problem.value().workspace && problem.value().workspace_bytes == 2 * 3 * 64);
  CHECK(validate<VisibilityCall>(problem.value(), kHopper).ok());
}

void chunks_of_visibility() {
  const auto chunks = [](std::int64_t seqlen_q, std::int64_t seqlen_k) {
    Shape shape;
    shape.batch = 2, shape.num_heads_q = 3, shape.seqlen_q = seqlen_q, shape.seqlen_k = seqlen_k;
    const Chunks of = chunks_of(shape);
    CHECK(visibility_workspace_bytes(shape) == 2 * 3 * 64 * of.count);
    return std::pair(of.rows, of.count);
  };
  CHECK(chunks(1, 1) == std::pair(1024, 1));
  CHECK(chunks(1024, 1025) == std::pair(1024, 2));
  CHECK(chunks(1 << 20, 5) == std::pair(1024, 1024));
  CHECK(chunks(5, (1 << 20) + 1) == std::pair(2048, 513));
  CHECK(chunks(kMaxSeqlen, kMaxSeqlen) == std::pair(1 << 18, 1024));
}

void refuses_visibility() {
  const auto refuses = [](const auto& change, const char* part) {
    Making call;
    change(call);
    const auto problem = call.decode();
    CHECK_REFUSES(
        problem.ok() ? validate<VisibilityCall>(problem.value(), kHopper) : problem.status(), part);
  };
  using C = Making;
  const auto refuses_optionals = [&](const std::vector<Buffer>& optionals, const char* part) {
    refuses([&](C& c) { c.optionals = optionals; }, part);
  };
  refuses_optionals({{"key_value_segment_ids", kS32, {2, 90}}},
                    "operands must have query_segment_ids with key_value_segment_ids");
  refuses_optionals({{"cu_seqlens_k", kS32, {2, 5}}},
                    "operands must have both of cu_seqlens_q and cu_seqlens_k, or none");
  refuses_optionals({{"query_segment_ids", kS32, {2, 90}}},
                    "query_segment_ids must have shape [-1, 100], got [2, 90]");
  refuses_optionals(
      {{"query_segment_ids", kS32, {2, 100}}},
      "query_segment_ids without key_value_segment_ids must have one id for each of 90 keys");
  refuses_optionals({{"cu_seqlens_q", kS32, {2, 0}}, {"cu_seqlens_k", kS32, {2, 0}}},
                    "the number of cu_seqlens must be in [1, ");
  refuses([](C& c) { c.result = {2, 3, kWords - 4}; }, "visibility must have shape [-1, -1, 400]");
  refuses([](C& c) { c.options.attention_chunk = -1; }, "attention_chunk must be in [0, ");
  refuses([](C& c) { c.options.window_left = -1; }, "window_left must be in [0, ");
  refuses(
      [](C& c) {
        c.options.seqlen_k = 0, c.result = {2, 3, 4 + 200 + 8};
      },
      "seqlen_k must be in [1, ");
  refuses([](C& c) { --c.workspace_bytes; }, "workspace must have 384 bytes, got 383");
  refuses([](C& c) { c.workspace_address = 4104; }, "workspace must be aligned to 16 bytes");
}

// A mask of 65 rows and 300 keys: two groups of classes, lines of ten words and of three.
struct MaskTable {
  ffi::DataType dtype = ffi::DataType::PRED;
  Dims mask{2, 3, 65, 300};
  Dims table{2, 3, 2 * 3 + 65 * 10 + 300 * 3 + 8};
  std::uintptr_t mask_address = 0;
  std::uintptr_t table_address = 0;

  StatusOr<DenseMaskProblem> decode() const {
    return decoded<DenseMaskCall>({{"mask", dtype, mask, mask_address}}, {},
                                  {{"mask_table", kS32, table, table_address}}, {});
  }
};

void decodes_dense_mask() {
  MaskTable call;
  call.table_address = 4100;
  const auto problem = call.decode();
  CHECK_DETAIL(problem.ok(), problem.status().message());
  const Shape& shape = problem.value().shape;
  CHECK(shape.batch == 2 && shape.num_heads_q == 3);
  CHECK(shape.seqlen_q == 65 && shape.seqlen_k == 300);
  CHECK(problem.value().mask && problem.value().table && problem.value().words == call.table[2]);
  CHECK(validate<DenseMaskCall>(problem.value(), kHopper).ok());
}

void refuses_dense_mask() {
  const auto refuses = [](const auto& change, const char* part) {
    MaskTable call;
    change(call);
    const auto problem = call.decode();
    CHECK_REFUSES(
        problem.ok() ? validate<DenseMaskCall>(problem.value(), kHopper) : problem.status(), part);
  };
  using C = MaskTable;
  refuses([](C& c) { c.dtype = ffi::DataType::U8; }, "mask must be PRED, got U8");
  refuses([](C& c) { c.mask = {3, 65, 300}; }, "mask must have shape [-1, -1, -1, -1]");
  refuses([](C& c) { c.table[1] = 1; }, "mask_table must have shape [2, 3, -1]");
  refuses([](C& c) { --c.table[2]; },
          "mask_table must have 321 words of one row or 1564 of 65 rows, got 1563");
  refuses([](C& c) { c.table[2] = 321; },
          "mask_table must have 1564 words of a plane for 65 rows and 300 keys, got 321");

  const auto refuses_extents = [&](int rows, int keys, const char* part) {
    refuses(
        [&](C& c) {
          c.mask = {2, 3, rows, keys};
          c.table[2] = DenseMaskLayout{1, std::min(keys, kMaxSeqlen)}.words();
        },
        part);
  };
  refuses_extents(kMaxSeqlen + 1, 300, "the mask's rows must be in [0, 268435456], got 268435457");
  refuses_extents(65, kMaxSeqlen + 1, "the mask's keys must be in [0, 268435456], got 268435457");
  refuses_extents(1 << 18, 1 << 18,
                  "words of a plane of mask_table must be in [0, 2147483647], got 4299");
  refuses(
      [](C& c) {
        c.mask = {1 << 16, 1 << 15, 1, 1};
        c.table = {1 << 16, 1 << 15, 2 + 1 + 1 + 8};
      },
      "batch * heads * blocks must be below 2^31");
  refuses([](C& c) { c.mask_address = 4104; }, "mask must be aligned to 16 bytes");
  refuses([](C& c) { c.table_address = 4098; }, "mask_table must be aligned to 4 bytes");
}

}  // namespace
}  // namespace jax_fa3

int main() {
  jax_fa3::decodes_dense_mask();
  jax_fa3::refuses_dense_mask();
  jax_fa3::decodes_row_intervals();
  jax_fa3::decodes_dense_arrays();
  jax_fa3::refuses_dense_arrays();
  jax_fa3::decodes_visibility();
  jax_fa3::chunks_of_visibility();
  jax_fa3::refuses_visibility();
  jax_fa3::decodes_quantize();
  jax_fa3::refuses_quantize();
  jax_fa3::decodes_float8();
  jax_fa3::refuses_float8();
  jax_fa3::decodes();
  jax_fa3::refuses_buffers();
  jax_fa3::refuses_other_numbers();
  jax_fa3::refuses_values();
  return jax_fa3::test::finish();
}
