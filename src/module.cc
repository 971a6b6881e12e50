// The Python module _C: handlers to register, what is compiled, and the plans.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>

#include "kernels/backward/dispatch.h"
#include "kernels/forward/dispatch.h"
#include "kernels/forward_float8/dispatch.h"
#if defined(JAX_FA3_CUDA)
#include "ffi/handlers.h"
#endif

namespace nb = nanobind;

namespace jax_fa3 {
namespace {

#if defined(JAX_FA3_CUDA)
constexpr bool kCudaEnabled = true;

nb::dict registrations() {
  const auto capsule = [](XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {
    return nb::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
  };
  nb::dict targets;
  targets["jax_fa3_forward"] = capsule(jax_fa3_forward);
  targets["jax_fa3_forward_float8"] = capsule(jax_fa3_forward_float8);
  targets["jax_fa3_backward"] = capsule(jax_fa3_backward);
  targets["jax_fa3_quantize"] = capsule(jax_fa3_quantize);
  return targets;
}
#else
constexpr bool kCudaEnabled = false;

nb::dict registrations() { return nb::dict(); }
#endif

template <class Key>
nb::dict key_dict(const char* direction, const char* dtype, const Key& key) {
  nb::dict dict;
  dict["direction"] = direction;
  dict["dtype"] = dtype;
  dict["head_dim"] = key.head_dim;
  dict["head_dim_v"] = key.head_dim_v;
  dict["block_m"] = key.block_m;
  dict["block_n"] = key.block_n;
  return dict;
}

nb::dict to_dict(const ForwardKey& key) { return key_dict("forward", to_string(key.dtype), key); }

nb::dict to_dict(const ForwardFloat8Key& key) {
  nb::dict dict = key_dict("forward_float8", "e4m3", key);
  dict["promote"] = key.promote;
  return dict;
}

nb::dict to_dict(const BackwardKey& key) {
  nb::dict dict = key_dict("backward", to_string(key.dtype), key);
  dict["separate_dq"] = key.separate_dq;
  return dict;
}

template <class... Keys>
nb::list to_list(const std::vector<Keys>&... keys) {
  nb::list list;
  const auto append = [&](const auto& of_one_direction) {
    for (const auto& key : of_one_direction) list.append(to_dict(key));
  };
  (append(keys), ...);
  return list;
}

DType parse_dtype(const std::string& name) {
  for (const DType dtype : {DType::kBF16, DType::kFP16}) {
    if (name == to_string(dtype)) return dtype;
  }
  throw nb::value_error(("dtype must be 'bf16' or 'fp16', got '" + name + "'").c_str());
}

template <class Plan>
const Plan& value_or_raise(const StatusOr<Plan>& plan) {
  if (!plan.ok()) throw nb::value_error(plan.status().message().c_str());
  return plan.value();
}

void add_order(nb::dict& dict, const TileOrder& order) {
  dict["num_m_blocks"] = order.num_m_blocks;
  dict["heads_per_group"] = order.heads_per_group;
  dict["longest_first"] = order.longest_first;
  dict["num_tiles"] = order.num_tiles;
  dict["grid"] = order.grid;
}

nb::dict forward_plan(const std::string& dtype, std::int64_t batch, std::int64_t seqlen_q,
                      std::int64_t seqlen_k, std::int64_t num_heads_q, std::int64_t num_heads_kv,
                      std::int64_t head_dim, std::int64_t head_dim_v, std::int32_t window_left,
                      std::int32_t window_right, int num_sms) {
  const Shape shape{parse_dtype(dtype), batch,        seqlen_q, seqlen_k,
                    num_heads_q,        num_heads_kv, head_dim, head_dim_v};
  const auto planned =
      plan_forward(shape, {window_left, window_right, 0}, plannable_forward_kernels(), num_sms);
  const ForwardPlan& plan = value_or_raise(planned);
  nb::dict dict = to_dict(plan.key);
  add_order(dict, plan);
  return dict;
}

nb::dict forward_float8_plan(std::int64_t batch, std::int64_t seqlen_q, std::int64_t seqlen_k,
                             std::int64_t num_heads_q, std::int64_t num_heads_kv,
                             std::int64_t head_dim, std::int64_t head_dim_v,
                             std::int32_t window_left, std::int32_t window_right,
                             bool value_is_prepared, int num_sms) {
  const Shape shape{DType::kBF16, batch,        seqlen_q, seqlen_k,
                    num_heads_q,  num_heads_kv, head_dim, head_dim_v};
  const auto planned = plan_forward_float8(shape, {window_left, window_right, 0}, value_is_prepared,
                                           plannable_forward_float8_kernels(), num_sms);
  const ForwardFloat8Plan& plan = value_or_raise(planned);
  nb::dict dict = to_dict(plan.key);
  add_order(dict, plan);
  dict["workspace_bytes"] = plan.workspace_bytes;
  return dict;
}

nb::dict backward_plan(const std::string& dtype, std::int64_t batch, std::int64_t seqlen_q,
                       std::int64_t seqlen_k, std::int64_t num_heads_q, std::int64_t num_heads_kv,
                       std::int64_t head_dim, std::int64_t head_dim_v, bool deterministic,
                       int num_sms) {
  const Shape shape{parse_dtype(dtype), batch,        seqlen_q, seqlen_k,
                    num_heads_q,        num_heads_kv, head_dim, head_dim_v};
  const auto planned = plan_backward(shape, deterministic, plannable_backward_kernels(), num_sms);
  const BackwardPlan& plan = value_or_raise(planned);
  nb::dict dict = to_dict(plan.key);
  dict["num_m_blocks"] = plan.num_m_blocks;
  dict["num_n_blocks"] = plan.num_n_blocks;
  dict["heads_per_group"] = plan.heads_per_group;
  dict["num_tiles"] = plan.num_tiles;
  dict["grid"] = plan.grid;
  dict["dq_offset"] = plan.dq_offset;
  dict["statistics_offset"] = plan.statistics_offset;
  dict["tile_counters_offset"] = plan.tile_counters_offset;
  dict["workspace_bytes"] = plan.workspace_bytes;
  return dict;
}

}  // namespace

NB_MODULE(_C, module) {
  using namespace nb::literals;
  module.doc() = "Kernels, XLA handlers and plans of jax_fa3.";
  module.attr("cuda_enabled") = kCudaEnabled;
  module.def("registrations", &registrations,
             "Handlers to register with XLA for the CUDA platform: target name to capsule.");
  module.def(
      "compiled_kernels",
      [] {
        return to_list(compiled_forward_kernels(), compiled_forward_float8_kernels(),
                       compiled_backward_kernels());
      },
      "The kernels linked into this build.");
  module.def(
      "listed_kernels",
      [] {
        return to_list(listed_forward_kernels(), listed_forward_float8_kernels(),
                       listed_backward_kernels());
      },
      "All kernels of the matrix, compiled or not.");
  module.def("forward_plan", &forward_plan, "dtype"_a, "batch"_a, "seqlen_q"_a, "seqlen_k"_a,
             "num_heads_q"_a, "num_heads_kv"_a, "head_dim"_a, "head_dim_v"_a, "window_left"_a,
             "window_right"_a, "num_sms"_a,
             "Tile, order and grid of a forward call. Raises ValueError with the reason.");
  module.def("forward_float8_plan", &forward_float8_plan, "batch"_a, "seqlen_q"_a, "seqlen_k"_a,
             "num_heads_q"_a, "num_heads_kv"_a, "head_dim"_a, "head_dim_v"_a, "window_left"_a,
             "window_right"_a, "value_is_prepared"_a, "num_sms"_a,
             "Tile, order, grid and workspace of a float8 forward call. Raises ValueError with the "
             "reason.");
  module.def("backward_plan", &backward_plan, "dtype"_a, "batch"_a, "seqlen_q"_a, "seqlen_k"_a,
             "num_heads_q"_a, "num_heads_kv"_a, "head_dim"_a, "head_dim_v"_a, "deterministic"_a,
             "num_sms"_a,
             "Tile, grid and workspace of a backward call. Raises ValueError with the reason.");
}

}  // namespace jax_fa3
