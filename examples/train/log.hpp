#pragma once

// What a run tells: its progress on the screen, and a CSV file.

#include "files.hpp"
#include "task.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

namespace train {

/// How far a run is. Time and tokens are those of training steps; evaluation is not counted.
struct Progress {
  Index step = 0;
  double seconds = 0;
  double cpu_seconds = 0;
  Index tokens = 0;
  double peak_mib = 0;  ///< the most memory that the process ever held, data included
  Loss since_row;       ///< the losses of training that no row of the log holds yet

  template <class Visit>
  void for_each(Visit&& visit) {
    visit("step", step);
    visit("seconds", seconds);
    visit("cpu_seconds", cpu_seconds);
    visit("tokens", tokens);
    visit("peak_mib", peak_mib);
    visit("since_row.cross_entropy", since_row.cross_entropy);
    visit("since_row.correct", since_row.correct);
    visit("since_row.targets", since_row.targets);
  }
};

/// Measures from its making on.
class Stopwatch {
 public:
  void add_to(Progress& progress) const {
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start_;
    progress.seconds += passed.count();
    progress.cpu_seconds += static_cast<double>(std::clock() - cpu_start_) / CLOCKS_PER_SEC;
    progress.peak_mib = std::max(progress.peak_mib, peak_mib());
  }

 private:
  static double peak_mib() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return static_cast<double>(usage.ru_maxrss) / (1024 * 1024);
#else
    return static_cast<double>(usage.ru_maxrss) / 1024;
#endif
  }

  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::clock_t cpu_start_ = std::clock();
};

/// The file log.csv, a row for every stretch of training and every evaluation, and the same for whoever watches.
/// Seconds, tokens and memory are totals of the training until then.
class Log {
 public:
  /// Goes on after the rows of the first `step` steps; drops what the run is about to write again, and what follows on
  /// damage.
  Log(const std::filesystem::path& path, Index step, Index steps, const Task& task)
      : path_(path), steps_(steps), task_(task) {
    std::ifstream old(path);
    std::string rows = head, row;
    std::getline(old, row);
    while (std::getline(old, row) && step_of(row).value_or(step + 1) <= step &&
           row.find(",test,") == std::string::npos) {
      rows += row + '\n';
    }
    old.close();
    write_file(path, rows);
    file_.open(path, std::ios::app);
  }

  void row(std::string_view part, const Progress& progress, const Loss& loss) {
    std::ostringstream row;
    row << progress.step << ',' << part << ',' << mean(loss) << ',' << task_.score(loss) << ',' << progress.seconds
        << ',' << progress.cpu_seconds << ',' << progress.tokens << ',' << progress.peak_mib << '\n';
    write(row.str());
    show(part, progress, loss);
    std::printf("\n");
    std::fflush(stdout);
  }

  /// A line on a terminal that the next one covers.
  void show_step(const Progress& progress) const {
    if (isatty(STDOUT_FILENO) == 0) return;
    show("training", progress, progress.since_row);
    std::fflush(stdout);
  }

 private:
  static constexpr const char* head = "step,part,loss,score,seconds,cpu_seconds,tokens,peak_mib\n";

  /// Nothing if the text is not a row.
  static std::optional<Index> step_of(std::string_view row) {
    const std::string_view number = row.substr(0, row.find(','));
    Index step = 0;
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), step);
    const auto commas = [](std::string_view text) { return std::count(text.begin(), text.end(), ','); };
    if (error != std::errc{} || end != number.data() + number.size() || commas(row) != commas(head)) return {};
    return step;
  }

  static double mean(const Loss& loss) { return loss.cross_entropy / static_cast<double>(loss.targets); }

  void show(std::string_view part, const Progress& progress, const Loss& loss) const {
    const double left =
        progress.seconds / static_cast<double>(progress.step) * static_cast<double>(steps_ - progress.step);
    std::printf("\r%td/%td  %-10.*s  loss %.4f  %s %.2f  %.0f tokens/s  %.0f min left  ", progress.step, steps_,
                static_cast<int>(part.size()), part.data(), mean(loss), task_.score_name().c_str(), task_.score(loss),
                static_cast<double>(progress.tokens) / progress.seconds, std::ceil(left / 60));
  }

  void write(const std::string& rows) {
    file_ << rows << std::flush;
    if (!file_) throw std::runtime_error("cannot write the file " + path_.string() + ".");
  }

  std::filesystem::path path_;
  Index steps_;
  const Task& task_;
  std::ofstream file_;
};

}  // namespace train
