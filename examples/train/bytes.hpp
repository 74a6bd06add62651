#pragma once

#include "files.hpp"
#include "task.hpp"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

namespace train {

/// Language modelling of the bytes of any files: each byte is to be predicted from those before it. The last twentieth
/// of the text is for the test, the twentieth before it for validation.
class BytesTask : public Task {
 public:
  static Setting setting() {
    return {.steps = 1000, .batch = 16, .length = 512, .width = 128, .heads = 4, .feed_forward = 512, .dropout = 0};
  }

  /// Without files, the manual of Perl.
  BytesTask(const Setting& setting, std::vector<std::string> files)
      : length_(setting.length), batch_(setting.batch), seed_(setting.seed) {
    if (files.empty()) files = perl_manual();
    for (const std::string& file : files) text_ += read_file(file);
    if (held_out() <= length_) {
      throw std::runtime_error("the text has " + std::to_string(text_.size()) + " bytes, too few for a length of " +
                               std::to_string(length_) + ".");
    }
  }

  ModelOptions model() const override { return {.vocabulary = 256, .max_length = length_, .classes = 256}; }
  bool causal() const override { return true; }

  Batch training_batch(Index step) const override {
    Random random = random_for(seed_, Purpose::training_data, step);
    Batch batch;
    for (Index b = 0; b < batch_; ++b) append(random.below(size() - 2 * held_out() - length_), batch);
    return batch;
  }

  Index evaluation_batches(Part) const override { return std::min<Index>(evaluated, held_out() - 1) / length_; }
  Batch evaluation_batch(Part part, Index number) const override {
    Batch batch;
    append(size() - (part == Part::test ? 1 : 2) * held_out() + number * length_, batch);
    return batch;
  }

  std::string score_name() const override { return "bits per byte"; }
  double score(const Loss& loss) const override {
    return loss.cross_entropy / static_cast<double>(loss.targets) / std::log(2.0);
  }

 private:
  static constexpr Index evaluated = 1 << 18;  ///< bytes at most

  /// Where Debian's package perl-doc puts it.
  static std::vector<std::string> perl_manual() {
    namespace fs = std::filesystem;
    std::vector<std::string> files;
    std::error_code none;
    for (const fs::directory_entry& version : fs::directory_iterator("/usr/share/perl", none)) {
      if (version.is_symlink()) continue;
      for (const fs::directory_entry& file : fs::directory_iterator(version.path() / "pod", none)) {
        if (file.path().extension() == ".pod") files.push_back(file.path());
      }
    }
    if (files.size() < 100) {
      throw std::runtime_error("there is no text: name files, or install Debian's package perl-doc.");
    }
    std::sort(files.begin(), files.end());
    return files;
  }

  Index size() const { return static_cast<Index>(text_.size()); }
  Index held_out() const { return size() / 20; }

  void append(Index first, Batch& batch) const {
    for (Index i = first; i < first + length_; ++i) {
      batch.tokens.push_back(byte(i));
      batch.targets.push_back(byte(i + 1));
    }
    batch.end_sequence();
  }

  int byte(Index i) const { return static_cast<unsigned char>(text_[static_cast<std::size_t>(i)]); }

  std::string text_;
  Index length_, batch_;
  std::uint64_t seed_;
};

}  // namespace train
