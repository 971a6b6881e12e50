// The Python module _C: handlers to register, what is compiled, and the plans.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>

#include "kernels/backward/family.h"
#include "kernels/forward/family.h"
#include "kernels/forward_cached/family.h"
#include "kernels/forward_float8/family.h"
#if defined(JAX_FA3_CUDA)
#include "handlers.h"
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
#define JFA_REGISTER(name) targets[#name] = capsule(name);
  JFA_CUSTOM_CALLS(JFA_REGISTER)
#undef JFA_REGISTER
#define JFA_REGISTER(name)                               \
  {                                                      \
    nb::dict stages;                                     \
    stages["instantiate"] = capsule(name##_instantiate); \
    stages["execute"] = capsule(name);                   \
    targets[#name] = stages;                             \
  }
  JFA_LINKED_CALLS(JFA_REGISTER)
#undef JFA_REGISTER
  return targets;
}
#else
constexpr bool kCudaEnabled = false;

nb::dict registrations() { return nb::dict(); }
#endif

nb::dict to_dict(const Fields& fields) {
  nb::dict dict;
  for (const auto& [name, value] : fields) {
    std::visit([&](const auto& x) { dict[name] = x; }, value);
  }
  return dict;
}

// The kernels of all families, by a list of each.
template <class List>
nb::list kernels(const List& keys_of) {
  nb::list list;
  const auto append = [&](auto family) {
    for (const auto& key : keys_of(family)) list.append(to_dict(family.describe(key)));
  };
  append(Forward{});
  append(ForwardFloat8{});
  append(ForwardCached{});
  append(Backward{});
  return list;
}

nb::list compiled_kernels() {
  return kernels([](auto family) { return KernelTable<decltype(family)>::compiled(); });
}

nb::list listed_kernels() {
  return kernels([](auto family) { return KernelTable<decltype(family)>::listed(); });
}

DType parse_dtype(const std::string& name) {
  for (const DType dtype : {DType::kBF16, DType::kFP16}) {
    if (name == to_string(dtype)) return dtype;
  }
  throw nb::value_error(("dtype must be 'bf16' or 'fp16', got '" + name + "'").c_str());
}

Variant parse_variant(const std::string& name) {
  std::string names;
  for (const Variant variant : kVariants) {
    if (name == to_string(variant)) return variant;
    names += std::string(names.empty() ? "" : ", ") + to_string(variant);
  }
  throw nb::value_error(("variant must be one of " + names + ", got '" + name + "'").c_str());
}

template <class Family>
nb::dict plan_dict(const StatusOr<typename Family::Plan>& plan) {
  if (!plan.ok()) throw nb::value_error(plan.status().message().c_str());
  return to_dict(Family::describe(plan.value()));
}

nb::dict forward_plan(const std::string& dtype, std::int64_t batch, std::int64_t seqlen_q,
                      std::int64_t seqlen_k, std::int64_t num_heads_q, std::int64_t num_heads_kv,
                      std::int64_t head_dim, std::int64_t head_dim_v, std::int32_t window_left,
                      std::int32_t window_right, bool has_index_arrays, bool has_visibility,
                      const std::string& variant, int num_sms) {
  const Shape shape{parse_dtype(dtype), batch,        seqlen_q, seqlen_k,
                    num_heads_q,        num_heads_kv, head_dim, head_dim_v};
  return plan_dict<Forward>(plan_forward(shape, {window_left, window_right, 0},
                                         {has_index_arrays, has_visibility, parse_variant(variant)},
                                         KernelTable<Forward>::plannable(), num_sms));
}

nb::dict forward_float8_plan(std::int64_t batch, std::int64_t seqlen_q, std::int64_t seqlen_k,
                             std::int64_t num_heads_q, std::int64_t num_heads_kv,
                             std::int64_t head_dim, std::int64_t head_dim_v,
                             std::int32_t window_left, std::int32_t window_right,
                             bool has_index_arrays, bool has_visibility, bool value_is_prepared,
                             int num_sms) {
  const Shape shape{DType::kBF16, batch,        seqlen_q, seqlen_k,
                    num_heads_q,  num_heads_kv, head_dim, head_dim_v};
  return plan_dict<ForwardFloat8>(
      plan_forward_float8(shape, {window_left, window_right, 0}, {has_index_arrays, has_visibility},
                          value_is_prepared, KernelTable<ForwardFloat8>::plannable(), num_sms));
}

nb::dict backward_plan(const std::string& dtype, std::int64_t batch, std::int64_t seqlen_q,
                       std::int64_t seqlen_k, std::int64_t num_heads_q, std::int64_t num_heads_kv,
                       std::int64_t head_dim, std::int64_t head_dim_v, bool has_index_arrays,
                       bool has_visibility, const std::string& variant, bool deterministic,
                       int num_sms) {
  const Shape shape{parse_dtype(dtype), batch,        seqlen_q, seqlen_k,
                    num_heads_q,        num_heads_kv, head_dim, head_dim_v};
  return plan_dict<Backward>(
      plan_backward(shape, {has_index_arrays, has_visibility, parse_variant(variant)},
                    deterministic, KernelTable<Backward>::plannable(), num_sms));
}

// With rows_per_sequence 0 sequences have what rows query_starts gives them.
nb::dict plan_of_forward_cached(const std::string& dtype, std::int64_t batch, std::int64_t tokens,
                                std::int64_t rows_per_sequence, std::int64_t num_heads_q,
                                std::int64_t num_heads_kv, std::int64_t head_dim,
                                std::int64_t head_dim_v, std::int64_t page_size,
                                bool has_block_tables, int num_sms) {
  const bool is_ragged = rows_per_sequence == 0;
  const Shape shape{parse_dtype(dtype), batch,       is_ragged ? tokens : rows_per_sequence,
                    page_size,          num_heads_q, num_heads_kv,
                    head_dim,           head_dim_v};
  return plan_dict<ForwardCached>(
      plan_forward_cached(shape, is_ragged, has_block_tables ? static_cast<int>(page_size) : 0,
                          KernelTable<ForwardCached>::plannable(), num_sms));
}

}  // namespace

NB_MODULE(_C, module) {
  using namespace nb::literals;
  module.doc() = "Kernels, XLA handlers and plans of jax_fa3.";
  module.attr("cuda_enabled") = kCudaEnabled;
  module.def("registrations", &registrations,
             "Handlers to register with XLA for the CUDA platform: target name to capsule, or to "
             "capsules by stage.");
  module.def("compiled_kernels", &compiled_kernels, "The kernels linked into this build.");
  module.def("listed_kernels", &listed_kernels, "All kernels of the matrix, compiled or not.");
  module.def("forward_plan", &forward_plan, "dtype"_a, "batch"_a, "seqlen_q"_a, "seqlen_k"_a,
             "num_heads_q"_a, "num_heads_kv"_a, "head_dim"_a, "head_dim_v"_a, "window_left"_a,
             "window_right"_a, "has_index_arrays"_a, "has_visibility"_a, "variant"_a, "num_sms"_a,
             "Tile, order and grid of a forward call. Raises ValueError with the reason.");
  module.def("forward_float8_plan", &forward_float8_plan, "batch"_a, "seqlen_q"_a, "seqlen_k"_a,
             "num_heads_q"_a, "num_heads_kv"_a, "head_dim"_a, "head_dim_v"_a, "window_left"_a,
             "window_right"_a, "has_index_arrays"_a, "has_visibility"_a, "value_is_prepared"_a,
             "num_sms"_a,
             "Tile, order, grid and workspace of a float8 forward call. Raises ValueError with the "
             "reason.");
  module.def(
      "plan_forward_cached", &plan_of_forward_cached, "dtype"_a, "batch"_a, "tokens"_a,
      "rows_per_sequence"_a, "num_heads_q"_a, "num_heads_kv"_a, "head_dim"_a, "head_dim_v"_a,
      "page_size"_a, "has_block_tables"_a, "num_sms"_a,
      "Kernel, grid, workspace and counters of a forward call over caches. Raises ValueError "
      "with the reason.");
  module.def("backward_plan", &backward_plan, "dtype"_a, "batch"_a, "seqlen_q"_a, "seqlen_k"_a,
             "num_heads_q"_a, "num_heads_kv"_a, "head_dim"_a, "head_dim_v"_a, "has_index_arrays"_a,
             "has_visibility"_a, "variant"_a, "deterministic"_a, "num_sms"_a,
             "Tile, grid and workspace of a backward call. Raises ValueError with the reason.");
}

}  // namespace jax_fa3
