#pragma once

#include "files.hpp"

#include <algorithm>
#include <filesystem>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace train {

/// The command line of a run in parts: its task, and each option with its value.
inline std::vector<std::string> parts_of(const std::string& run) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0, end; begin < run.size(); begin = end + 1) {
    end = std::min(run.find(" --", begin), run.size());
    parts.push_back(run.substr(begin, end - begin));
  }
  return parts;
}

/// The parts of a run that the other one does not have, but for how often it evaluates, which changes nothing in it.
inline std::string what_differs(const std::string& run, const std::string& other) {
  const std::vector<std::string> others = parts_of(other);
  std::string text;
  for (const std::string& part : parts_of(run)) {
    if (part.starts_with("--evaluate-every ") || std::find(others.begin(), others.end(), part) != others.end())
      continue;
    text += (text.empty() ? "" : " ") + part;
  }
  return text;
}

/// All that a run needs to go on as if it had never stopped: named arrays of numbers, and what run they are of.
///
/// The file is sealed with a checksum. It holds numbers in the order of bytes of the machine that wrote it.
class Checkpoint {
 public:
  /// `run` says in words which run this is, as its command line does: task, model, settings, seed.
  explicit Checkpoint(std::string run) : run_(std::move(run)) {}

  template <class T>
  void put(const std::string& name, std::span<const T> numbers) {
    static_assert(std::is_arithmetic_v<T>);
    parts_[name].assign(reinterpret_cast<const char*>(numbers.data()), numbers.size_bytes());
  }

  /// Throws std::runtime_error unless there are just as many numbers of that name.
  template <class T>
  void get(const std::string& name, std::span<T> numbers) const {
    static_assert(std::is_arithmetic_v<T>);
    const auto part = parts_.find(name);
    if (part == parts_.end()) throw std::runtime_error("the checkpoint holds no " + name + ".");
    if (part->second.size() != numbers.size_bytes()) {
      throw std::runtime_error("the checkpoint holds " + std::to_string(part->second.size()) + " bytes of " + name +
                               ", but " + std::to_string(numbers.size_bytes()) + " are needed.");
    }
    std::memcpy(numbers.data(), part->second.data(), numbers.size_bytes());
  }

  void save(const std::filesystem::path& path) const {
    ByteWriter content;
    content.text(run_);
    for (const auto& [name, bytes] : parts_) {
      content.text(name);
      content.text(bytes);
    }
    write_sealed(path, first_line, content.bytes());
  }

  /// Throws std::runtime_error if the file cannot be read, is damaged, is no checkpoint, or is one of another run.
  static Checkpoint load(const std::filesystem::path& path, const std::string& run) {
    const std::string bytes = read_sealed(path, first_line);
    ByteReader content(bytes);
    Checkpoint checkpoint{std::string(content.text())};
    const std::string there = what_differs(checkpoint.run_, run), here = what_differs(run, checkpoint.run_);
    if (!there.empty() || !here.empty()) {
      throw std::runtime_error(path.string() + " is a checkpoint of another run: it has " +
                               (there.empty() ? "no more" : there) + ", but this one has " +
                               (here.empty() ? "no more" : here) + ".");
    }
    while (!content.at_end()) {
      const std::string name(content.text());
      checkpoint.parts_[name] = content.text();
    }
    return checkpoint;
  }

 private:
  static constexpr std::string_view first_line = "nearfar training checkpoint 1";

  std::string run_;
  std::map<std::string, std::string> parts_;
};

}  // namespace train
