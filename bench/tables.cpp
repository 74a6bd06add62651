#include "format.hpp"
#include "probes.hpp"
#include "report.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <set>
#include <stdexcept>

namespace bench {
namespace {

/// The rows of one family in one direction on one number of threads.
struct View {
  const std::vector<Result>& results;
  std::string family;
  bool causal;
  int threads;

  std::string title() const {
    return family + ", " + (causal ? "causal" : "bidirectional") + ", " + std::to_string(threads) +
           (threads == 1 ? " thread" : " threads");
  }

  const Result* find(const std::string& mechanism, Index n) const {
    const std::string name = Row{family, mechanism, causal, n, threads}.name();
    for (const Result& result : results) {
      if (result.error.empty() && result.row.name() == name) return &result;
    }
    return nullptr;
  }

  /// In the order in which they were measured.
  std::vector<std::string> mechanisms() const {
    std::vector<std::string> names;
    for (const Result& result : results) {
      if (result.row.family != family || result.row.causal != causal || result.row.threads != threads) continue;
      if (std::find(names.begin(), names.end(), result.row.mechanism) == names.end()) {
        names.push_back(result.row.mechanism);
      }
    }
    return names;
  }

  std::vector<Index> lengths() const {
    std::set<Index> lengths;
    for (const Result& result : results) {
      if (result.row.family == family && result.row.causal == causal && result.row.threads == threads) {
        lengths.insert(result.row.n);
      }
    }
    return {lengths.begin(), lengths.end()};
  }

  View with_family(const std::string& other) const { return {results, other, causal, threads}; }
  View with_threads(int other) const { return {results, family, causal, other}; }
};

using Cell = std::function<std::string(const std::string& mechanism, Index n)>;

/// A table of mechanisms by lengths; nothing is printed where every cell is empty.
void print_table(const std::string& title, const std::vector<std::string>& mechanisms,
                 const std::vector<Index>& lengths, const Cell& cell) {
  std::vector<std::vector<std::string>> lines{{"n"}};
  for (const Index n : lengths) lines[0].push_back(std::to_string(n));
  for (const std::string& mechanism : mechanisms) {
    std::vector<std::string> line{mechanism};
    for (const Index n : lengths) line.push_back(cell(mechanism, n));
    if (std::any_of(line.begin() + 1, line.end(), [](const std::string& text) { return !text.empty(); })) {
      lines.push_back(std::move(line));
    }
  }
  if (lines.size() == 1) return;
  std::printf("\n%s\n", title.c_str());
  std::vector<std::size_t> widths(lines[0].size(), 0);
  for (const auto& line : lines) {
    for (std::size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  }
  for (const auto& line : lines) {
    std::printf("  %-*s", static_cast<int>(widths[0]), line[0].c_str());
    for (std::size_t i = 1; i < line.size(); ++i) {
      std::printf("  %*s", static_cast<int>(widths[i]), line[i].empty() ? "-" : line[i].c_str());
    }
    std::printf("\n");
  }
}

/// Rows with heads of another width, another scalar or a single query do not belong beside the others.
bool comparable(const std::string& mechanism) {
  return mechanism != "softmax_d128" && mechanism != "softmax_decode" && !mechanism.ends_with("_double");
}

/// Rows that move so much for what they compute that memory is their limit.
bool moves_memory(const std::string& mechanism) {
  return mechanism == "additive" || mechanism == "additive_per_head" || mechanism == "softmax_decode";
}

/// Softmax's time at n; beyond its last length that time grown by n^2, which sets `extrapolated`.
double softmax_seconds(const View& view, Index n, bool& extrapolated) {
  extrapolated = false;
  if (const Result* measured = view.find("softmax", n)) return measured->seconds;
  const Result* last = nullptr;
  for (const Index other : view.lengths()) {
    if (const Result* found = other < n ? view.find("softmax", other) : nullptr) last = found;
  }
  if (last == nullptr) return std::nan("");
  extrapolated = true;
  return last->seconds * std::pow(static_cast<double>(n) / static_cast<double>(last->row.n), 2);
}

void print_against_softmax(const View& view) {
  std::vector<Index> lengths;
  for (const Index n : view.lengths()) {
    if (view.lengths().size() <= 6 || std::countr_zero(static_cast<std::size_t>(n)) % 2 == 0) lengths.push_back(n);
  }
  print_table(view.title() + ": time, speed-up over softmax (~ where softmax is extrapolated), extra memory",
              view.mechanisms(), lengths, [&](const std::string& mechanism, Index n) -> std::string {
                const Result* result = comparable(mechanism) ? view.find(mechanism, n) : nullptr;
                if (result == nullptr) return "";
                bool extrapolated = false;
                const double ratio = softmax_seconds(view, n, extrapolated) / result->seconds;
                const std::string speed_up =
                    std::isnan(ratio) ? "" : text("%s%s", extrapolated ? "~" : "", ratio_text(ratio).c_str());
                return text("%7s %7s %5s", time_text(result->seconds).c_str(), speed_up.c_str(),
                            bytes_text(result->counter("extra_bytes")).c_str());
              });
  Index last = 0;
  for (const Index n : view.lengths()) last = view.find("softmax", n) ? n : last;
  if (last != 0 && last < view.lengths().back()) {
    std::printf("  softmax stops at n = %td, where one call takes %s\n", last,
                time_text(view.find("softmax", last)->seconds).c_str());
  }
}

void print_percentages(const View& view) {
  print_table(view.title() + ": GFLOP/s and percent of the peak (additive and decode: GB/s and percent of bandwidth)",
              view.mechanisms(), view.lengths(), [&](const std::string& mechanism, Index n) -> std::string {
                const Result* result = view.find(mechanism, n);
                if (result == nullptr) return "";
                const bool moves = moves_memory(mechanism);
                return text("%.1f %3.0f%%", result->counter(moves ? "gbytes_per_second" : "gflops"),
                            result->counter(moves ? "percent_of_bandwidth" : "percent_of_peak"));
              });
}

void print_errors(const View& view) {
  print_table(
      view.title() + ": |out - exact| / |exact|, exact softmax in double (tokens that drift: alike within some 50)",
      view.mechanisms(), view.lengths(), [&](const std::string& mechanism, Index n) -> std::string {
        const Result* result = view.find(mechanism, n);
        const double error = result == nullptr ? std::nan("") : result->counter("relative_error");
        return std::isnan(error) ? "" : text("%.1e", error);
      });
}

/// From which measured length on a mechanism is faster than softmax, and the place between two lengths where their
/// lines cross.
void print_crossings(const View& view) {
  bool title = false;
  for (const std::string& mechanism : view.mechanisms()) {
    if (mechanism.starts_with("softmax") || !comparable(mechanism)) continue;
    std::string losses;
    std::string crossing;
    double before = std::nan("");
    Index n_before = 0;
    for (const Index n : view.lengths()) {
      const Result* ours = view.find(mechanism, n);
      const Result* softmax = view.find("softmax", n);
      if (ours == nullptr || softmax == nullptr) continue;
      const double ratio = softmax->seconds / ours->seconds;
      if (ratio < 1) {
        losses += text(ratio < 0.99 ? " %.2fx at %td" : " %.3fx at %td", ratio, n);
        crossing.clear();
      } else if (crossing.empty()) {
        crossing = text("faster from n = %td on", n);
        if (before < 1) {
          const double part = std::log(1 / before) / std::log(ratio / before);
          const double place =
              static_cast<double>(n_before) * std::pow(static_cast<double>(n) / static_cast<double>(n_before), part);
          crossing += text(" (the lines cross near %.0f)", place);
        }
      }
      before = ratio;
      n_before = n;
    }
    if (n_before == 0) continue;
    if (!title) std::printf("\n%s: where softmax is passed\n", view.title().c_str());
    title = true;
    std::printf("  %-18s %s%s%s\n", mechanism.c_str(),
                crossing.empty() ? "not faster at the longest length of both" : crossing.c_str(),
                losses.empty() ? "" : "; slower:", losses.c_str());
  }
}

void print_peers(const View& ours) {
  for (const char* peer : {"eigen", "openblas", "libtorch"}) {
    const View view = ours.with_family(std::string("peer/") + peer);
    print_table(view.title() + ": its time over nearfar's, and its percent of the peak", view.mechanisms(),
                view.lengths(), [&](const std::string& mechanism, Index n) -> std::string {
                  const Result* theirs = view.find(mechanism, n);
                  const Result* result = ours.find(mechanism, n);
                  if (theirs == nullptr || result == nullptr) return "";
                  return text("%s %3.0f%%", ratio_text(theirs->seconds / result->seconds).c_str(),
                              theirs->counter("percent_of_peak"));
                });
  }
}

void print_scaling(const View& one, int threads) {
  const View all = one.with_threads(threads);
  print_table(all.title() + ": time on one thread over time on all", all.mechanisms(), all.lengths(),
              [&](const std::string& mechanism, Index n) -> std::string {
                const Result* many = all.find(mechanism, n);
                const Result* single = one.find(mechanism, n);
                return many == nullptr || single == nullptr ? "" : ratio_text(single->seconds / many->seconds);
              });
}

void print_growth(const View& view) {
  print_table(view.title() + ": microseconds a token", view.mechanisms(), view.lengths(),
              [&](const std::string& mechanism, Index n) -> std::string {
                const Result* result = view.find(mechanism, n);
                if (result == nullptr || !comparable(mechanism)) return "";
                return text("%.3f", result->seconds / static_cast<double>(n) * 1e6);
              });
}

/// 0 where no row has been measured that shows it. The peak is that of float.
double median_of(const std::vector<Result>& results, const std::string& counter, int threads) {
  std::vector<double> values;
  for (const Result& result : results) {
    const bool other_peak = counter == "peak_gflops" && result.row.mechanism.ends_with("_double");
    if (result.row.threads == threads && result.error.empty() && !other_peak) values.push_back(result.counter(counter));
  }
  return median(values);
}

std::set<int> thread_counts(const std::vector<Result>& results) {
  std::set<int> counts;
  for (const Result& result : results) counts.insert(result.row.threads);
  return counts;
}

}  // namespace

void print_tables(const std::vector<Result>& results) {
  const std::set<int> counts = thread_counts(results);
  const auto for_each_view = [&](auto&& print) {
    for (const bool causal : {false, true}) {
      for (const int threads : counts) print(View{results, "forward", causal, threads});
    }
  };
  for_each_view(print_against_softmax);
  for_each_view([](const View& view) { print_against_softmax(view.with_family("backward")); });
  for_each_view(print_crossings);
  for_each_view(print_percentages);
  for_each_view([](const View& view) { print_percentages(view.with_family("backward")); });
  for_each_view(print_peers);
  for (const bool causal : {false, true}) {
    const View fewest{results, "forward", causal, counts.empty() ? 1 : *counts.begin()};
    if (counts.size() > 1) {
      print_scaling(fewest, *counts.rbegin());
      print_scaling(fewest.with_family("backward"), *counts.rbegin());
    }
    print_growth(fewest);
    print_errors(fewest);
  }
  std::printf("\nThe machine during the run (medians over all rows)\n");
  for (const int threads : counts) {
    if (median_of(results, "triad_gbytes_per_second", threads) == 0) continue;
    std::printf("  threads:%d ", threads);
    if (const double peak = median_of(results, "peak_gflops", threads); peak > 0) {
      const double clock = clock_bound();
      std::printf(" FMA peak %.1f GFLOP/s in float (%.1f flops a cycle at %.2f GHz) ", peak, peak * 1e9 / clock,
                  clock * 1e-9);
    }
    std::printf(" triad %.1f GB/s, with non-temporal stores %.1f GB/s\n",
                median_of(results, "triad_gbytes_per_second", threads),
                median_of(results, "triad_non_temporal_gbytes_per_second", threads));
  }
  for (const Result& result : results) {
    if (!result.error.empty()) std::printf("\n%s failed: %s\n", result.row.name().c_str(), result.error.c_str());
  }
}

void write_plots(const std::vector<Result>& results, const std::string& folder) {
  std::filesystem::create_directories(folder);
  const auto open = [&](const std::string& name) {
    std::ofstream file(std::filesystem::path(folder) / name);
    if (!file) throw std::runtime_error("cannot write " + folder + "/" + name);
    return file;
  };
  for (const bool causal : {false, true}) {
    const View view{results, "forward", causal, 1};
    std::ofstream file = open(causal ? "causal.dat" : "bidirectional.dat");
    for (const std::string& mechanism : view.mechanisms()) {
      if (!comparable(mechanism)) continue;
      file << "# " << mechanism << "\n# n milliseconds extra_mebibytes flops_a_byte gflops\n";
      for (const Index n : view.lengths()) {
        const Result* result = view.find(mechanism, n);
        if (result == nullptr) continue;
        file << n << ' ' << result->seconds * 1e3 << ' ' << result->counter("extra_bytes") / (1024 * 1024) << ' '
             << result->counter("gflops") / result->counter("gbytes_per_second") << ' ' << result->counter("gflops")
             << '\n';
      }
      file << "\n\n";
    }
  }
  open("machine.gp") << "peak = " << median_of(results, "peak_gflops", 1) << "\nbandwidth = "
                     << std::max(median_of(results, "triad_gbytes_per_second", 1),
                                 median_of(results, "triad_non_temporal_gbytes_per_second", 1))
                     << '\n';
}

}  // namespace bench
