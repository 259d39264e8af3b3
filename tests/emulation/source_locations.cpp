// Places in the kernels' source, from the line tables of their library.
#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <map>
#include <sstream>

#include "scheduler.h"

namespace gatedrnn::emulation {
namespace {

// What a program writes, started without a shell: a path may have any characters.
std::string output_of(std::vector<std::string> words) {
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return "";
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  pid_t process;
  const bool runs =
      posix_spawnp(&process, arguments[0], &actions, nullptr, arguments.data(), environ) == 0;
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  std::string output;
  char part[4096];
  for (ssize_t size; runs && (size = read(ends[0], part, sizeof(part))) > 0;)
    output.append(part, static_cast<size_t>(size));
  close(ends[0]);
  if (runs) waitpid(process, nullptr, 0);
  return output;
}

// The line of a call or an access, and those that it was inlined into, innermost first.
struct Chain {
  std::string lines;      // of the kernels' own files; empty if nothing is known
  std::string functions;  // with the lines in them
};

const Chain& chain(const void* code) {
  static std::map<const void*, Chain> known;
  const auto [found, is_new] = known.try_emplace(code);
  Chain& chain = found->second;
  Dl_info library;
  if (!is_new || !dladdr(code, &library)) return chain;
  std::ostringstream offset;  // of the call, which returns to `code`
  offset << "0x" << std::hex
         << static_cast<const char*>(code) - static_cast<const char*>(library.dli_fbase) - 1;
  std::istringstream output(
      output_of({"addr2line", "-f", "-i", "-e", library.dli_fname, offset.str()}));
  for (std::string function, line; std::getline(output, function) && std::getline(output, line);) {
    const size_t file = line.rfind('/') + 1;  // 0 if there is none
    const std::string place = line.substr(file, line.find(' ', file) - file);
    if (place.starts_with("?")) continue;
    chain.functions += function + " at " + place + "\n";
    if (!place.starts_with("cuda_emulation.h"))
      chain.lines += (chain.lines.empty() ? "" : " < ") + place;
  }
  return chain;
}

bool same(Where a, Where b) {
  // A kernel is compiled as one piece, which has each file's name once.
  return a.line() == b.line() && a.column() == b.column() && a.file_name() == b.file_name();
}

}  // namespace

bool same(const At& a, const At& b) {
  if (a.code == b.code) return true;
  // One call of a wrapper, as in all of the kernels, is not another; but what the compiler has made
  // two of, a loop's for one, is one.
  return same(a.where, b.where) && chain(a.code).functions == chain(b.code).functions;
}

std::string name(const At& at) {
  std::ostringstream text;
  const std::string& lines = chain(at.code).lines;
  const std::string file = at.where.file_name();
  if (!lines.empty())
    text << lines;
  else if (at.where.line() != 0)
    text << file.substr(file.rfind('/') + 1) << ':' << at.where.line();
  else
    text << "code " << at.code;
  if (at.where.line() != 0) text << " in " << at.where.function_name();
  return text.str();
}

std::string name(Size at) {
  std::ostringstream text;
  text << '(' << at.x << ", " << at.y << ", " << at.z << ')';
  return text.str();
}

}  // namespace gatedrnn::emulation
