// The Python module _C: handlers to register, what is compiled, and the plans.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>

#include "call/text.h"
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

template <class Visit>
void for_each_family(const Visit& visit) {
  visit(Forward{});
  visit(ForwardFloat8{});
  visit(ForwardCached{});
  visit(Backward{});
}

// The kernels of all families, by a list of each.
template <class List>
nb::list kernels(const List& keys_of) {
  nb::list list;
  for_each_family([&](auto family) {
    for (const auto& key : keys_of(family)) list.append(to_dict(family.describe(key)));
  });
  return list;
}

nb::list compiled_kernels() {
  return kernels([](auto family) { return KernelTable<decltype(family)>::compiled(); });
}

nb::list listed_kernels() {
  return kernels([](auto family) { return KernelTable<decltype(family)>::listed(); });
}

// What a plan depends on, by name.
class Choices {
 public:
  explicit Choices(nb::dict values) : values_(std::move(values)) {}

  template <class T>
  T get(const char* name) const {
    if (!values_.contains(name)) {
      throw nb::type_error(concat("the plan needs ", name, ", which is missing").c_str());
    }
    T value;
    if (nb::try_cast(values_[name], value)) return value;
    throw nb::type_error(concat(name, " has a wrong type for the plan").c_str());
  }

  // One of `choices`, by its name.
  template <class Range>
  auto get(const char* name, const Range& choices) const {
    const auto got = get<std::string>(name);
    std::string names;
    for (const auto choice : choices) {
      if (got == to_string(choice)) return choice;
      names += concat(names.empty() ? "" : ", ", to_string(choice));
    }
    throw nb::value_error(concat(name, " must be one of ", names, ", got '", got, "'").c_str());
  }

  DType dtype() const { return get("dtype", std::array{DType::kBF16, DType::kFP16}); }
  int num_sms() const { return get<int>("num_sms"); }
  Shape shape(DType dtype) const {
    const auto extent = [this](const char* name) { return get<std::int64_t>(name); };
    return {dtype,
            extent("batch"),
            extent("seqlen_q"),
            extent("seqlen_k"),
            extent("num_heads_q"),
            extent("num_heads_kv"),
            extent("head_dim"),
            extent("head_dim_v")};
  }
  MaskOptions mask() const {
    return {get<std::int32_t>("window_left"), get<std::int32_t>("window_right"), 0};
  }
  IndexPresence presence() const {
    return {get<bool>("has_index_arrays"), get<bool>("has_visibility"), get("variant", kVariants)};
  }

 private:
  nb::dict values_;
};

StatusOr<ForwardPlan> plan_of(Forward, const Choices& c) {
  return plan_forward(c.shape(c.dtype()), c.mask(), c.presence(), KernelTable<Forward>::plannable(),
                      c.num_sms());
}

StatusOr<ForwardFloat8Plan> plan_of(ForwardFloat8, const Choices& c) {
  return plan_forward_float8(c.shape(DType::kBF16), c.mask(), c.presence(),
                             c.get<bool>("value_is_prepared"),
                             KernelTable<ForwardFloat8>::plannable(), c.num_sms());
}

StatusOr<BackwardPlan> plan_of(Backward, const Choices& c) {
  return plan_backward(c.shape(c.dtype()), c.mask(), c.presence(), c.get<bool>("deterministic"),
                       KernelTable<Backward>::plannable(), c.num_sms());
}

StatusOr<ForwardCachedPlan> plan_of(ForwardCached, const Choices& c) {
  return plan_forward_cached(c.shape(c.dtype()), c.get<bool>("is_ragged"), c.get<int>("page_size"),
                             KernelTable<ForwardCached>::plannable(), c.num_sms());
}

nb::dict plan(const std::string& family, const nb::kwargs& choices) {
  nb::dict found;
  std::string names;
  bool is_known = false;
  for_each_family([&](auto candidate) {
    names += concat(names.empty() ? "" : ", ", candidate.kName);
    if (family != candidate.kName) return;
    is_known = true;
    const auto plan = plan_of(candidate, Choices(choices));
    if (!plan.ok()) throw nb::value_error(plan.status().message().c_str());
    found = to_dict(candidate.describe(plan.value()));
  });
  if (is_known) return found;
  throw nb::value_error(concat("family must be one of ", names, ", got '", family, "'").c_str());
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
  module.def("plan", &plan, "family"_a, "choices"_a,
             "Kernel, tiles, order, grid and workspace of a call of a family, by what they depend "
             "on. Raises ValueError with the reason if no kernel fits.");
}

}  // namespace jax_fa3
