// The activations of bias_act_dropout: the one list of them for both libraries and the fast path.
//
// fusednorm/_activations.py is the same table in Python. tests/activation/test_table.py compares the two, and a library
// that was built with another list does not load.
#pragma once

#include <cstdint>

// F(enumerator, name, linear, cubic), in the order of their numbers. The last two say which u sigmoid(w) an activation is,
// w = u (linear + cubic u^2). They are 0 for another form, which each library then has as a specialization of its own.
// Of gelu_tanh linear is 2 sqrt(2 / pi) and cubic 0.044715 linear, because tanh(v) is 2 sigmoid(2 v) - 1.
#define FN_ACTIVATIONS(F)                                                     \
  F(Relu, "relu", 0, 0)                                                       \
  F(Gelu, "gelu", 0, 0)                                                       \
  F(GeluTanh, "gelu_tanh", 1.5957691216057308, 0.044715 * 1.5957691216057308) \
  F(Silu, "silu", 1, 0)                                                       \
  F(QuickGelu, "quick_gelu", 1.702, 0)

namespace fusednorm {

enum Activation : int {
#define FN_ENUMERATOR(enumerator, ...) k##enumerator,
  FN_ACTIVATIONS(FN_ENUMERATOR)
#undef FN_ENUMERATOR
};

struct ActivationForm {
  const char* name;
  double linear, cubic;
};

// By number.
constexpr ActivationForm kActivations[] = {
#define FN_FORM(enumerator, name, linear, cubic) {name, linear, cubic},
    FN_ACTIVATIONS(FN_FORM)
#undef FN_FORM
};
constexpr int64_t kActivationCount = sizeof kActivations / sizeof *kActivations;

// In an operator's options the number stands above this many switches, so no count of activations is too large.
constexpr int kActivationShift = 2;

}  // namespace fusednorm
