#pragma once

#include <nearfar/detail/errors.hpp>

#include <algorithm>
#include <charconv>
#include <locale>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

/// The words by which a line names the values of an enumeration, whose enumerators count from 0, in their order:
/// specialise it as an array for the options of a mechanism of your own.
template <class Enum>
inline constexpr auto enumerator_names = nullptr;

namespace detail {

// A mechanism and its options as one line of text:
//
//   line   = mechanism [ ":" option { "," option } ]
//   option = name "=" value | name                       name alone, of an option that is on or off, means on
//
// Blanks around words are passed over.

inline constexpr std::string_view any_attention_name = "AnyAttention";

/// A line cut into its words, which stay where they are.
struct OptionLine {
  struct Option {
    std::string_view name;
    std::optional<std::string_view> value;
  };

  std::string_view mechanism;
  std::vector<Option> options;
};

inline std::string_view without_blanks(std::string_view text) {
  constexpr std::string_view blanks = " \t\r\n";
  const std::size_t first = text.find_first_not_of(blanks);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(blanks) - first + 1);
}

/// What stands before and after the first separator; nothing after it where there is none.
inline std::pair<std::string_view, std::optional<std::string_view>> cut(std::string_view text, char separator) {
  const std::size_t at = text.find(separator);
  if (at == std::string_view::npos) return {without_blanks(text), std::nullopt};
  return {without_blanks(text.substr(0, at)), without_blanks(text.substr(at + 1))};
}

inline OptionLine cut_line(std::string_view text) {
  auto [mechanism, rest] = cut(text, ':');
  OptionLine line{mechanism, {}};
  while (rest) {
    const auto [option, further] = cut(*rest, ',');
    const auto [name, value] = cut(option, '=');
    line.options.push_back({name, value});
    rest = further;
  }
  return line;
}

template <class Words>
std::string joined(const Words& words, std::string_view separator = ", ") {
  std::string text;
  for (const std::string_view word : words) {
    if (!text.empty()) text += separator;
    text += word;
  }
  return text;
}

/// How the values of a type are written. A specialisation says what a value is (for errors), reads one, or nothing
/// where the text is none, and prints one such that reading it gives the same. (They are templates so that only a
/// program that reads lines pays for compiling them.)
template <class Value>
struct ValueText;

template <std::integral Whole>
struct ValueText<Whole> {
  static std::string expected() { return "a whole number"; }

  static std::optional<Whole> read(std::string_view text) {
    Whole value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
    return value;
  }

  static std::string print(Whole value) { return std::to_string(value); }
};

template <>
struct ValueText<bool> {
  static std::string expected() { return "on or off"; }

  static std::optional<bool> read(std::string_view text) {
    if (text == "on" || text == "true") return true;
    if (text == "off" || text == "false") return false;
    return std::nullopt;
  }

  static std::string print(bool value) { return value ? "on" : "off"; }
};

// Streams of the classic locale, because not every standard library converts double by <charconv>.
template <std::floating_point Real>
struct ValueText<Real> {
  static std::string expected() { return "a number"; }

  static std::optional<Real> read(std::string_view text) {
    std::istringstream stream{std::string(text)};
    stream.imbue(std::locale::classic());
    Real value = 0;
    stream >> std::noskipws >> value;
    if (stream.fail() || stream.peek() != std::istringstream::traits_type::eof()) return std::nullopt;
    return value;
  }

  /// In few digits that give the same number again: 0.5, 20, 1e-6.
  static std::string print(Real value) {
    std::string text;
    for (int digits = 3; digits <= 17 && read(text) != value; ++digits) {
      std::ostringstream stream;
      stream.imbue(std::locale::classic());
      stream.precision(digits);
      stream << value;
      text = stream.str();
    }
    if (const std::size_t e = text.find('e'); e != std::string::npos) {
      text = text.substr(0, e + 1) + std::to_string(std::stoi(text.substr(e + 1)));
    }
    return text;
  }
};

/// A value that is not set is written as none.
template <class Value>
struct ValueText<std::optional<Value>> {
  static std::string expected() { return ValueText<Value>::expected() + " or none"; }

  static std::optional<std::optional<Value>> read(std::string_view text) {
    if (text == "none") return std::optional<Value>();
    if (const auto value = ValueText<Value>::read(text)) return std::optional<Value>(value);
    return std::nullopt;
  }

  static std::string print(const std::optional<Value>& value) {
    return value ? ValueText<Value>::print(*value) : "none";
  }
};

template <class Enum>
requires std::is_enum_v<Enum>
struct ValueText<Enum> {
  static std::string expected() { return "one of " + joined(enumerator_names<Enum>); }

  static std::optional<Enum> read(std::string_view text) {
    const auto& names = enumerator_names<Enum>;
    const auto at = std::find(names.begin(), names.end(), text);
    if (at == names.end()) return std::nullopt;
    return static_cast<Enum>(at - names.begin());
  }

  static std::string print(Enum value) { return std::string(enumerator_names<Enum>[static_cast<std::size_t>(value)]); }
};

/// One option of a mechanism: its name, and how a line reads and prints it.
template <class Options>
struct LineOption {
  std::string_view name;
  std::string (*expected)();
  bool (*read)(std::optional<std::string_view> text, Options& options);
  std::string (*print)(const Options& options);
};

template <auto... Path>
constexpr auto& member(auto& options) {
  return (options.*....*Path);
}

template <class Class, class Member>
Class class_of(Member Class::*);

/// The option that is a member of the options, or a member of a member:
/// line_option<&BandedOptions::window, &Window::left>("left").
template <auto First, auto... Rest>
constexpr auto line_option(std::string_view name) {
  using Options = decltype(class_of(First));
  using Value = std::remove_cvref_t<decltype(member<First, Rest...>(std::declval<Options&>()))>;
  return LineOption<Options>{
      name, &ValueText<Value>::expected,
      [](std::optional<std::string_view> text, Options& options) {
        if (std::same_as<Value, bool> && !text) text = "on";
        const auto value = text ? ValueText<Value>::read(*text) : std::nullopt;
        if (value) member<First, Rest...>(options) = *value;
        return value.has_value();
      },
      [](const Options& options) { return ValueText<Value>::print(member<First, Rest...>(options)); }};
}

/// The names of options: of a table, or of those that a line gives.
template <class NamedOptions>
std::vector<std::string_view> names_of(const NamedOptions& options) {
  std::vector<std::string_view> names;
  names.reserve(options.size());
  for (const auto& option : options) names.push_back(option.name);
  return names;
}

/// The options that a line asks for. Throws std::invalid_argument if it names an option that is not in the table, or
/// one twice, or gives a value that is none.
template <class Options>
Options read_options(const OptionLine& line, std::span<const LineOption<Options>> table) {
  Options options;
  for (auto given = line.options.begin(); given != line.options.end(); ++given) {
    const auto has_name = [&](const auto& option) { return option.name == given->name; };
    const auto option = std::find_if(table.begin(), table.end(), has_name);
    require(option != table.end(), any_attention_name, "unknown option \"", given->name, "\" of ", line.mechanism,
            "; known are ", table.empty() ? "none" : joined(names_of(table)), ".");
    require(std::none_of(line.options.begin(), given, has_name), any_attention_name, "option ", given->name, " of ",
            line.mechanism, " is given twice.");
    require(option->read(given->value, options), any_attention_name, "option ", given->name, " of ", line.mechanism,
            " must be ", option->expected(), ", but ",
            given->value ? "is \"" + std::string(*given->value) + "\"" : "has no value", ".");
  }
  return options;
}

/// The names of the options that differ from their defaults.
template <class Options>
std::vector<std::string_view> names_of_changed(const Options& options, std::span<const LineOption<Options>> table) {
  std::vector<std::string_view> names;
  for (const LineOption<Options>& option : table) {
    if (option.print(options) != option.print(Options{})) names.push_back(option.name);
  }
  return names;
}

/// The line that gives the named options the values they have.
template <class Options>
std::string print_line(std::string_view mechanism, std::span<const std::string_view> names, const Options& options,
                       std::span<const LineOption<Options>> table) {
  std::string line(mechanism);
  for (char separator = ':'; const std::string_view name : names) {
    const auto option = std::find_if(table.begin(), table.end(), [&](const auto& one) { return one.name == name; });
    const std::string value = option->print(options);
    line += std::exchange(separator, ',');
    line += name;
    if (value != "on") line += "=" + value;
  }
  return line;
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
