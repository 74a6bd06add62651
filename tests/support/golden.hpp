#pragma once

#include <nearfar/attention.hpp>

#include "support/compare.hpp"
#include "support/sample.hpp"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace nearfar::test {

/// One file of the golden folder, as golden/FORMAT.md describes it: config lines and named arrays.
///
/// It is read strictly. Whatever departs from the format, a key or array that a test asks for and the file lacks, and
/// one that stands in the file and was not asked for by the time of `require_all_used()`, throws std::runtime_error
/// with a sentence that names the file: a case is never half tested.
class GoldenCase {
 public:
  explicit GoldenCase(const std::filesystem::path& path) : name_(path.filename().string()) {
    std::ifstream file(path, std::ios::binary);
    require(file.is_open(), "the file cannot be read.");
    read_config(file);
    read_arrays(file);
  }

  const std::string& name() const { return name_; }

  bool has(const std::string& key) const { return config_.contains(key); }

  const std::string& word(const std::string& key) {
    const auto found = config_.find(key);
    require(found != config_.end(), "the config has no key ", key, ".");
    found->second.used = true;
    return found->second.value;
  }

  double number(const std::string& key) { return to_number(word(key), "key " + key); }

  Index integer(const std::string& key) {
    const double value = number(key);
    require(value == std::floor(value) && value >= 0 && value < 1e15, "key ", key, " must be a whole number, not ",
            word(key), ".");
    return static_cast<Index>(value);
  }

  bool flag(const std::string& key) {
    const std::string& value = word(key);
    require(value == "0" || value == "1", "key ", key, " must be 0 or 1, not ", value, ".");
    return value == "1";
  }

  /// The option that a word stands for; a word that is not in the list is an error.
  template <class Option>
  Option choice(const std::string& key, const std::map<std::string, Option>& known) {
    return choose(key, word(key), known);
  }

  /// The options that a comma-separated list stands for, of which there must be `count`.
  template <class Option>
  std::vector<Option> choices(const std::string& key, Index count, const std::map<std::string, Option>& known) {
    std::vector<Option> result;
    std::istringstream words(word(key));
    for (std::string one; std::getline(words, one, ',');) result.push_back(choose(key, one, known));
    require(static_cast<Index>(result.size()) == count, "key ", key, " must list ", std::to_string(count),
            " words, not ", word(key), ".");
    return result;
  }

  bool has_array(const std::string& name) const { return arrays_.contains(name); }

  /// The array of this name, which must have this shape. Inputs are exact in float too.
  template <class T>
  Matrix<T> array(const std::string& name, Index rows, Index cols) {
    const auto found = arrays_.find(name);
    require(found != arrays_.end(), "there is no array ", name, ".");
    const Matrix<double>& values = found->second.value;
    require(values.rows() == rows && values.cols() == cols, "array ", name, " must be ", std::to_string(rows), " x ",
            std::to_string(cols), ".");
    found->second.used = true;
    return values.cast<T>();
  }

  /// Tests that know no gradients leave them out on purpose.
  void ignore_gradients() {
    for (auto& [name, array] : arrays_) array.used = array.used || name.starts_with("grad_");
  }

  /// Throws if the file says anything that the test did not ask for.
  void require_all_used() const {
    for (const auto& [key, entry] : config_) require(entry.used, "key ", key, " is unknown for this mechanism.");
    for (const auto& [name, array] : arrays_) require(array.used, "array ", name, " is unknown for this mechanism.");
  }

  template <class... Parts>
  void require(bool condition, const Parts&... parts) const {
    if (condition) return;
    std::string message = "golden case " + name_ + ": ";
    ((message += parts), ...);
    throw std::runtime_error(message);
  }

 private:
  template <class Value>
  struct Entry {
    Value value;
    bool used = false;
  };

  template <class Option>
  Option choose(const std::string& key, const std::string& word, const std::map<std::string, Option>& known) const {
    const auto found = known.find(word);
    require(found != known.end(), "key ", key, " has the unknown word ", word, ".");
    return found->second;
  }

  double to_number(const std::string& text, const std::string& where) const {
    char* end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    require(!text.empty() && end == text.c_str() + text.size() && std::isfinite(value), where,
            " must be a number, not ", text.empty() ? "nothing" : text, ".");
    return value;
  }

  void read_config(std::istream& file) {
    for (std::string line; std::getline(file, line);) {
      if (line == "---") return;
      const auto space = line.find(' ');
      require(space != std::string::npos && space > 0 && line.find(' ', space + 1) == std::string::npos,
              "a config line must be a key and a value, not: ", line);
      const bool is_new = config_.try_emplace(line.substr(0, space), Entry<std::string>{line.substr(space + 1)}).second;
      require(is_new, "key ", line.substr(0, space), " stands twice.");
    }
    require(false, "the config has no end (a line ---).");
  }

  void read_arrays(std::istream& file) {
    for (std::string line; std::getline(file, line);) {
      std::istringstream header(line);
      std::string word, name, rest;
      Index rows = -1, cols = -1;
      const bool read = static_cast<bool>(header >> word >> name >> rows >> cols) && !(header >> rest);
      require(read && word == "array" && rows >= 0 && cols >= 0,
              "an array must begin with array NAME ROWS COLS, not: ", line.substr(0, 60));
      Matrix<double> values(rows, cols);
      for (Index i = 0; i < rows; ++i) {
        require(static_cast<bool>(std::getline(file, line)), "array ", name, " ends early.");
        std::istringstream row(line);
        for (Index j = 0; j < cols; ++j) {
          std::string number;
          require(static_cast<bool>(row >> number), "a row of array ", name, " is too short.");
          values(i, j) = to_number(number, "array " + name);
        }
        require(!(row >> rest), "a row of array ", name, " is too long.");
      }
      require(arrays_.try_emplace(name, Entry<Matrix<double>>{std::move(values)}).second, "array ", name,
              " stands twice.");
    }
  }

  std::string name_;
  std::map<std::string, Entry<std::string>> config_;
  std::map<std::string, Entry<Matrix<double>>> arrays_;
};

/// The folder of golden cases: NEARFAR_GOLDEN_DIR of the environment, else tests/golden.
inline std::filesystem::path golden_folder() {
  const char* named = std::getenv("NEARFAR_GOLDEN_DIR");
  return named != nullptr && *named != '\0' ? named : NEARFAR_GOLDEN_DIR_DEFAULT;
}

/// Every file in the folder but descriptions (*.md), in alphabetical order; none where there is no such folder.
inline std::vector<std::filesystem::path> golden_files() {
  std::vector<std::filesystem::path> files;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(golden_folder(), error)) {
    if (entry.is_regular_file() && entry.path().extension() != ".md") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

/// The name of a file's test: letters, digits and underscores.
inline std::string golden_test_name(const std::filesystem::path& path) {
  std::string name = path.stem().string();
  std::replace_if(
      name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) == 0; }, '_');
  return name;
}

/// What every case holds: the heads, the options common to all mechanisms, and the inputs.
template <class T>
struct GoldenProblem {
  explicit GoldenProblem(GoldenCase& golden)
      : tokens(golden.integer("n")),
        heads{golden.integer("heads"), golden.integer("kv_heads"), golden.integer("head_dim")},
        causal(golden.flag("causal")),
        sample{golden.array<T>("q", tokens, heads.query_cols()), golden.array<T>("k", tokens, heads.key_cols()),
               golden.array<T>("v", tokens, heads.value_cols())} {
    golden.word("mechanism");
    if (!golden.flag("has_key_mask")) return;
    const Matrix<double> mask = golden.array<double>("key_mask", 1, tokens);
    for (const double byte : mask.reshaped()) {
      golden.require(byte == 0 || byte == 1, "array key_mask must hold 0 and 1 alone.");
      sample.key_mask.push_back(byte != 0);
    }
  }

  Index tokens;
  Heads heads;
  bool causal;
  Sample<T> sample;
};

/// How close the results must come, relative to max(1, largest |entry|) of an array.
struct GoldenTolerance {
  double out;
  double gradient;
};

/// As FORMAT.md says: 1e-12 for double, and 1e-10 for nystrom and for gradients where logits are large.
template <class T>
GoldenTolerance golden_tolerance(GoldenCase& golden) {
  const bool nystrom = golden.word("mechanism") == "nystrom";
  const bool large_logits = golden.has("logit_scale") && golden.number("logit_scale") > 1;
  if constexpr (std::is_same_v<T, double>) {
    return {nystrom ? 1e-10 : 1e-12, nystrom || large_logits ? 1e-10 : 1e-12};
  } else {
    return {2e-5, 5e-5};
  }
}

/// A test of one golden case for one mechanism and scalar type.
using GoldenRunner = void (*)(GoldenCase&);

/// The mechanisms that golden_test knows, by the name in the case files. A file golden_<mechanism>.cpp adds its own:
///
///   const bool known = add_golden_runner("softmax", run<double>, run<float>);
struct GoldenRunners {
  GoldenRunner in_double;
  GoldenRunner in_float;
};

inline std::map<std::string, GoldenRunners>& golden_runners() {
  static std::map<std::string, GoldenRunners> runners;
  return runners;
}

inline bool add_golden_runner(const std::string& mechanism, GoldenRunner in_double, GoldenRunner in_float) {
  return golden_runners().try_emplace(mechanism, GoldenRunners{in_double, in_float}).second;
}

/// Holds the gradients of query, key and value to the arrays of the case.
template <class T, class Gradients>
void expect_golden_input_gradients(GoldenCase& golden, const Gradients& actual, double tolerance) {
  const auto expect = [&](const std::string& name, const Matrix<T>& gradient) {
    const auto expected = golden.array<double>(name, gradient.rows(), gradient.cols());
    EXPECT_TRUE(close(gradient, expected, tolerance)) << name;
  };
  expect("grad_q", actual.query);
  expect("grad_k", actual.key);
  expect("grad_v", actual.value);
}

/// Holds an attention to a case: out, and if it can be trained the gradients too. `each_parameter(parameters, visit)`
/// calls visit(name, matrix) for each matrix of parameters (or of gradients of parameters) with the name that its array
/// has in the case; the caller has put the arrays' values into `attention.parameters()` before.
template <class A, class EachParameter>
void expect_golden(GoldenCase& golden, const A& attention, const Sample<typename A::Scalar>& sample,
                   EachParameter&& each_parameter) {
  using T = typename A::Scalar;
  const GoldenTolerance tolerance = golden_tolerance<T>(golden);
  const Index rows = sample.query.rows(), cols = attention.heads().out_cols();
  const auto out = golden.array<double>("out", rows, cols);
  const auto grad_out = golden.array<T>("grad_out", rows, cols);
  EXPECT_TRUE(close(run_forward(attention, sample), out, tolerance.out)) << "out";

  if constexpr (DifferentiableAttention<A>) {
    auto gradients = run_backward(attention, sample, grad_out);
    EXPECT_TRUE(close(gradients.out, out, tolerance.out)) << "out of the forward pass that saves";
    expect_golden_input_gradients<T>(golden, gradients, tolerance.gradient);
    each_parameter(gradients.parameters, [&](const std::string& name, const auto& gradient) {
      const auto expected = golden.array<double>("grad_" + name, gradient.rows(), gradient.cols());
      EXPECT_TRUE(close(gradient, expected, tolerance.gradient)) << "grad_" << name;
    });
  } else {
    golden.ignore_gradients();
  }
  golden.require_all_used();
}

/// The same for an attention that has nothing to learn.
template <class A>
void expect_golden(GoldenCase& golden, const A& attention, const Sample<typename A::Scalar>& sample) {
  expect_golden(golden, attention, sample, [](auto&, auto&&) {});
}

}  // namespace nearfar::test
