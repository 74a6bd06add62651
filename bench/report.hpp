#pragma once

#include "suite.hpp"

#include <benchmark/benchmark.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

namespace bench {

/// A row as it was measured.
struct Result {
  Row row;
  double seconds = 0;  // of the median call
  std::map<std::string, double> counters;
  std::string error;  // why it could not be measured; empty if it was

  /// NaN where the row has no such counter.
  double counter(const std::string& name) const;
};

/// Shows each row as it is done; at the end prints the tables, and writes what the plots are drawn from.
class Report : public benchmark::BenchmarkReporter {
 public:
  /// `plots` is the folder for the data of the plots; none are written if it is empty.
  Report(const Suite& suite, std::string plots)
      : rows_(suite.size()),
        processors_(suite.thread_counts().back()),
        notes_(suite.notes()),
        plots_(std::move(plots)) {}

  bool ReportContext(const Context& context) override;
  void ReportRuns(const std::vector<Run>& runs) override;
  void Finalize() override;

  /// Whether a row could not be measured.
  bool failed() const;

 private:
  std::size_t rows_;
  int processors_;
  std::vector<std::string> notes_;
  std::string plots_;
  std::vector<Result> results_;
};

/// The tables, from the results of one run (tables.cpp).
void print_tables(const std::vector<Result>& results);

/// The data of the plots, into an existing folder (tables.cpp).
void write_plots(const std::vector<Result>& results, const std::string& folder);

}  // namespace bench
