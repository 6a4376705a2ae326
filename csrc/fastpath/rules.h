// Answers of the rules in Python, kept by what they were asked: a look-up is cheaper than a call of Python.
#pragma once

#include <Python.h>

#include <c10/util/hash.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/object_ptr.h>

#include <array>
#include <unordered_map>

namespace fusednorm_fastpath {

// The GIL, which every call holds, guards it.
class Rule {
 public:
  using Question = std::array<int64_t, 5>;

  bool find(const char* module, const char* name) {
    THPObjectPtr found(PyImport_ImportModule(module));
    function_ = found ? PyObject_GetAttrString(found.get(), name) : nullptr;
    return function_ != nullptr;
  }

  // `format` and `args` are those of PyObject_CallFunction.
  template <class... Args>
  bool operator()(const Question& question, const char* format, Args... args) {
    const auto known = answers_.find(question);
    if (known != answers_.end()) return known->second;
    const uint64_t asked_in = generation_;
    THPObjectPtr found(PyObject_CallFunction(function_, format, args...));
    if (!found) throw python_error();
    const bool answer = found.get() == Py_True;
    if (answers_.size() >= kMost) answers_.clear();
    if (asked_in == generation_) answers_[question] = answer;  // another thread may have called forget()
    return answer;
  }

  void forget() {
    answers_.clear();
    ++generation_;
  }

 private:
  struct Hash {
    size_t operator()(const Question& question) const {
      size_t seed = 0;
      for (int64_t number : question) seed = c10::hash_combine(seed, size_t(number));
      return seed;
    }
  };
  static constexpr size_t kMost = 4096;

  PyObject* function_ = nullptr;
  uint64_t generation_ = 0;
  std::unordered_map<Question, bool, Hash> answers_;
};

}  // namespace fusednorm_fastpath
