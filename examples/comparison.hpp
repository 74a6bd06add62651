#pragma once

// What the text examples share: reading a file, and a table of mechanisms beside softmax.

#include "encoder_block.hpp"

#include <nearfar/nearfar.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace encoder {

/// The command line: the words that are no option, and --length N.
struct Arguments {
  std::vector<std::string> words;
  std::size_t length = 4096;

  Arguments(int count, char** values) {
    const std::vector<std::string> all(values + 1, values + count);
    for (auto word = all.begin(); word != all.end(); ++word) {
      if (*word == "--length") {
        if (++word == all.end()) throw std::invalid_argument("--length needs a number of bytes.");
        length = number(*word);
      } else if (word->starts_with("--")) {
        throw std::invalid_argument("unknown option " + *word + ", known is --length N.");
      } else {
        words.push_back(*word);
      }
    }
  }

 private:
  static std::size_t number(const std::string& word) {
    if (word.empty() || word.size() > 9 || word.find_first_not_of("0123456789") != std::string::npos) {
      throw std::invalid_argument("--length must be a number of bytes of up to nine digits, but is \"" + word + "\".");
    }
    return std::stoul(word);
  }
};

/// The first `length` bytes of a file; says so if there are more.
inline std::string read_text(const std::string& path, std::size_t length) {
  std::ifstream file(path, std::ios::binary);
  std::string text(length, '\0');
  file.read(text.data(), static_cast<std::streamsize>(length));
  text.resize(static_cast<std::size_t>(file.gcount()));
  const bool more = file.peek() != std::ifstream::traits_type::eof();
  // Some libraries read a folder as an empty file.
  if (!file.is_open() || file.bad() || std::filesystem::is_directory(path))
    throw std::runtime_error("cannot read the file " + path + ".");
  if (more) std::printf("Only the first %zu bytes of %s are read; --length N reads more.\n", length, path.c_str());
  return text;
}

/// What one call of attention took and gave.
struct Measurement {
  double milliseconds = 0;
  std::size_t bytes = 0;
  Matrix out;
};

/// Attention that measures the one it holds, and is Attention itself: so it fits where that one fits.
template <nearfar::Attention Held>
class Measured {
 public:
  using Scalar = typename Held::Scalar;

  Measured(Held held, Measurement& measurement) : held_(std::move(held)), measurement_(measurement) {}

  nearfar::Heads heads() const { return held_.heads(); }

  void forward(const nearfar::Inputs<Scalar>& inputs, nearfar::Tokens<Scalar> out) const {
    nearfar::Context context;
    nearfar::forward(held_, inputs, out, context);
    measurement_.bytes = context.scratch_bytes();

    // Further calls find their memory ready; the fastest is the least disturbed by the rest of the machine.
    measurement_.milliseconds = std::numeric_limits<double>::infinity();
    for (int call = 0; call < 3; ++call) {
      const auto start = std::chrono::steady_clock::now();
      nearfar::forward(held_, inputs, out, context);
      const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
      measurement_.milliseconds = std::min(measurement_.milliseconds, time.count());
    }
    measurement_.out = out.matrix();
  }

 private:
  Held held_;
  Measurement& measurement_;
};

/// Runs mechanisms over a text, all in the same encoder block, and prints a line for each.
class Comparison {
 public:
  static constexpr nearfar::Heads heads{.query = 4, .key_value = 4, .dim = 64};

  explicit Comparison(const std::string& text) : tokens_(embed(text, random_matrix(256, width, 1, random_))) {
    std::printf("%zu tokens, %td heads of %td\n\n", text.size(), heads.query, heads.dim);
    std::printf("%-40s %10s %12s %23s\n", "attention", "time, ms", "memory, KiB", "distance from softmax");
    softmax_ = run(nearfar::Softmax<float>(heads));
    print("softmax", softmax_);
  }

  template <nearfar::Attention Attention>
  void add(const std::string& name, const Attention& attention) const {
    print(name, run(attention));
  }

 private:
  static constexpr Index width = 256;

  template <nearfar::Attention Attention>
  Measurement run(const Attention& attention) const {
    Measurement measurement;
    const EncoderBlock block(Measured(attention, measurement), width, random_);
    if (!block(tokens_).allFinite()) throw std::runtime_error("the block's output is not finite.");
    return measurement;
  }

  void print(const std::string& name, const Measurement& of) const {
    const float distance = (of.out - softmax_.out).norm() / softmax_.out.norm();
    std::printf("%-40s %10.2f %12zu ", name.c_str(), of.milliseconds, (of.bytes + 1023) / 1024);
    std::printf("%23s\n", tokens_.rows() == 0 ? "none" : std::to_string(distance).c_str());
  }

  std::mt19937 random_{1};
  Matrix tokens_;
  Measurement softmax_;
};

}  // namespace encoder
