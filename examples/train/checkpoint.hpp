#pragma once

#include "files.hpp"

#include <filesystem>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace train {

/// All that a run needs to go on as if it had never stopped: named arrays of numbers, and what run they are of.
///
/// The file is sealed with a checksum. It holds numbers in the order of bytes of the machine that wrote it.
class Checkpoint {
 public:
  /// `run` says in words which run this is: task, model, settings, seed.
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
    if (checkpoint.run_ != run) {
      throw std::runtime_error(path.string() + " is a checkpoint of another run:\n  " + checkpoint.run_ +
                               "\nbut this one is\n  " + run);
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
