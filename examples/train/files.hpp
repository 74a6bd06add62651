#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <ios>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>

namespace train {

/// FNV-1a, 64 bits (Fowler, Noll and Vo): finds damage, not malice.
inline std::uint64_t checksum(std::string_view bytes) {
  std::uint64_t sum = 0xcbf29ce484222325U;
  for (const char byte : bytes) sum = (sum ^ static_cast<unsigned char>(byte)) * 0x100000001b3U;
  return sum;
}

inline std::string read_file(const std::filesystem::path& path) {
  std::error_code error;
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  std::string bytes(error ? 0 : size, '\0');
  std::ifstream file(path, std::ios::binary);
  file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (error || !file) throw std::runtime_error("cannot read the file " + path.string() + ".");
  return bytes;
}

/// Writes beside the file and renames: whatever happens to this process, the old file stands or the new one.
inline void write_file(const std::filesystem::path& path, std::string_view bytes) {
  std::filesystem::path unfinished = path;
  unfinished += ".unfinished";
  std::ofstream file(unfinished, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  std::error_code error;
  if (file) std::filesystem::rename(unfinished, path, error);
  if (!file || error) throw std::runtime_error("cannot write the file " + path.string() + ".");
}

/// Makes the folder, and those that it is in, where they are missing.
inline void make_folder(const std::filesystem::path& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) throw std::runtime_error("cannot make the folder " + path.string() + ": " + error.message() + ".");
}

/// Plain values one after another as bytes, in this machine's order.
class ByteWriter {
 public:
  template <class T>
  void number(T value) {
    static_assert(std::is_arithmetic_v<T>);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  /// The count of bytes, then the bytes.
  void text(std::string_view bytes) {
    number<std::uint64_t>(bytes.size());
    bytes_ += bytes;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

/// Reads what ByteWriter wrote; throws std::out_of_range where the bytes end too early.
class ByteReader {
 public:
  explicit ByteReader(std::string_view bytes) : rest_(bytes) {}

  template <class T>
  T number() {
    static_assert(std::is_arithmetic_v<T>);
    T value;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }
  std::string_view text() { return take(number<std::uint64_t>()); }
  bool at_end() const { return rest_.empty(); }

 private:
  std::string_view take(std::uint64_t count) {
    if (count > rest_.size()) throw std::out_of_range("the bytes end too early");
    const std::string_view taken = rest_.substr(0, count);
    rest_.remove_prefix(count);
    return taken;
  }

  std::string_view rest_;
};

/// `content` as a file that says what it is and can tell damage: a first line, the checksum, the content.
inline void write_sealed(const std::filesystem::path& path, std::string_view first_line, std::string_view content) {
  ByteWriter seal;
  seal.number(checksum(content));
  write_file(path, std::string(first_line) + '\n' + seal.bytes() + std::string(content));
}

/// The content of a file of write_sealed. Throws std::runtime_error, in a sentence, if it is foreign or damaged.
inline std::string read_sealed(const std::filesystem::path& path, std::string_view first_line) {
  std::string bytes = read_file(path);
  const std::string start = std::string(first_line) + '\n';
  if (!bytes.starts_with(start)) {
    throw std::runtime_error(path.string() + " is not a file of this kind: it does not begin with \"" +
                             std::string(first_line) + "\".");
  }
  bytes.erase(0, start.size());
  constexpr std::size_t seal = sizeof(std::uint64_t);
  const bool whole = bytes.size() >= seal &&
                     ByteReader(bytes).number<std::uint64_t>() == checksum(std::string_view(bytes).substr(seal));
  if (!whole) {
    throw std::runtime_error(path.string() + " is damaged: its content does not have the checksum that it names.");
  }
  bytes.erase(0, seal);
  return bytes;
}

}  // namespace train
