// As much of Linux as one static program needs, on a machine of which only the processor matters: an emulator of one.
//
// The emulator lacks what Linux asks for before it grants the registers of AMX (extended feature disable). Here the
// program owns the processor: ring 0, one thread, no interrupts.
#include <cstdint>

extern "C" {
extern char exceptions[];
extern uint64_t pml4[512];
[[noreturn]] void enter_program(uint64_t entry, uint64_t* stack);
void system_call();
}

namespace {

// Where emulate.py puts the program's file and its arguments; the program goes below them, its memory above.
constexpr uint64_t kArguments = 0x7fff000, kFile = 0x8000000, kMemory = 0x10000000, kPage = 4096;
// Memory for mmap, in pages that can fault: those of the second entry of the topmost table.
constexpr uint64_t kPages = 0x20000, kMapped = 0x8000000000;
alignas(kPage) uint64_t directory[512], middle[512], tables[kPages];
uint64_t next_page, heap;

void out(uint16_t port, uint8_t value) { asm volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }

void write_msr(uint32_t msr, uint64_t value) {
  asm volatile("wrmsr" : : "c"(msr), "a"(static_cast<uint32_t>(value)), "d"(static_cast<uint32_t>(value >> 32)));
}

// Bochs prints what goes to this port.
void print(const char* text, uint64_t count) {
  for (uint64_t i = 0; i < count; ++i) out(0xe9, text[i]);
}

void print(const char* text, uint64_t value, int digits) {
  for (; *text; ++text) out(0xe9, *text);
  while (digits--) out(0xe9, "0123456789abcdef"[value >> 4 * digits & 15]);
}

// Bochs stops at this word, and calls it a panic.
[[noreturn]] void end(uint64_t code) {
  print("\nexit ", code, 2);
  print("\n", 1);
  for (const char* word = "Shutdown"; *word; ++word) out(0x8900, *word);
  for (;;) asm volatile("hlt");
}

void fill(void* to, int value, uint64_t count) {
  asm volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(value) : "memory");
}

void copy(uint64_t to, uint64_t from, uint64_t count) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
}

uint64_t pages_of(uint64_t bytes) { return (bytes + kPage - 1) / kPage; }

// An entry that is not 0 is taken; the lowest bits say whether it can be read and written.
void set_pages(uint64_t address, uint64_t bytes, bool taken, bool accessible) {
  const uint64_t first = (address - kMapped) / kPage;
  if (first >= kPages) return;
  for (uint64_t i = first; i < first + pages_of(bytes); ++i) {
    tables[i] = taken ? (kMemory + i * kPage) | (accessible ? 3 : 0) : 0;
    asm volatile("invlpg (%0)" : : "r"(kMapped + i * kPage) : "memory");
  }
}

uint64_t map(uint64_t bytes) {
  for (int turn = 0; turn < 2; ++turn, next_page = 0) {
    uint64_t run = 0;
    for (uint64_t i = next_page; i < kPages; ++i) {
      run = tables[i] ? 0 : run + 1;
      if (run < pages_of(bytes)) continue;
      next_page = i + 1;
      const uint64_t address = kMapped + (next_page - run) * kPage;
      set_pages(address, bytes, true, true);
      fill(reinterpret_cast<void*>(address), 0, run * kPage);
      return address;
    }
  }
  return -12;
}

}  // namespace

extern "C" uint64_t answer(uint64_t number, uint64_t a, uint64_t b, uint64_t c) {
  constexpr uint64_t kInvalid = -22, kNotTerminal = -25, kNotImplemented = -38;
  switch (number) {
    case 1: print(reinterpret_cast<const char*>(b), c); return c;  // write
    case 5: fill(reinterpret_cast<void*>(b), 0, 144); return 0;    // fstat
    case 9: return map(b);                                         // mmap, of no file
    case 10: set_pages(a, b, true, c != 0); return 0;              // mprotect
    case 11: set_pages(a, b, false, false); return 0;              // munmap
    case 12: return heap = a >= heap && a < kArguments ? a : heap; // brk
    case 16: return kNotTerminal;                                  // ioctl
    case 60: case 231: end(a);                                     // exit
    case 158:                                                      // arch_prctl
      if (a == 0x1002) return write_msr(0xc0000100, b), 0;         // the base of FS
      return a == 0x1023 && b == 18 ? 0 : kInvalid;                // the registers of AMX are on already
    case 218: case 273: return 1;                                  // set_tid_address, set_robust_list
    case 262: fill(reinterpret_cast<void*>(c), 0, 144); return 0;  // newfstatat
    case 318: fill(reinterpret_cast<void*>(a), 1, b); return b;    // getrandom
    case 89: case 267: case 302: case 334: return kNotImplemented; // readlink, readlinkat, prlimit64, rseq
  }
  print("unknown system call ", number, 4);
  end(255);
}

// `stack`: number of the exception, a code where there is one, then rip, cs, flags and rsp.
extern "C" void fail(const uint64_t* stack) {
  uint64_t address;
  asm volatile("mov %%cr2, %0" : "=r"(address));
  print("exception ", stack[0], 2);
  print(", address ", address, 16);
  for (int i = 1; i < 6; ++i) print(" ", stack[i], 16);
  end(255);
}

extern "C" void start_machine() {
  alignas(16) static uint64_t gates[64];
  for (uint64_t i = 0; i < 32; ++i) {
    const uint64_t to = reinterpret_cast<uint64_t>(exceptions) + 16 * i;
    gates[2 * i] = (to & 0xffff) | 8 << 16 | 0x8e0000000000 | (to >> 16 & 0xffff) << 48;
  }
  struct [[gnu::packed]] {
    uint16_t limit = sizeof(gates) - 1;
    uint64_t* base = gates;
  } table;
  asm volatile("lidt %0" : : "m"(table));
  write_msr(0xc0000081, uint64_t{8} << 32);  // `syscall` keeps these segments
  write_msr(0xc0000082, reinterpret_cast<uint64_t>(system_call));
  write_msr(0xc0000084, 0);
  pml4[1] = reinterpret_cast<uint64_t>(directory) | 3;
  directory[0] = reinterpret_cast<uint64_t>(middle) | 3;
  for (uint64_t i = 0; i < kPages / 512; ++i) middle[i] = reinterpret_cast<uint64_t>(tables + i * 512) | 3;

  struct Header {
    uint32_t type, flags;
    uint64_t offset, address, unused, in_file, in_memory, alignment;
  };
  const uint64_t entry = *reinterpret_cast<uint64_t*>(kFile + 24);
  const uint64_t headers = kFile + *reinterpret_cast<uint64_t*>(kFile + 32);
  const uint16_t count = *reinterpret_cast<uint16_t*>(kFile + 56);
  for (int i = 0; i < count; ++i) {
    const Header& header = reinterpret_cast<const Header*>(headers)[i];
    if (header.type != 1) continue;
    copy(header.address, kFile + header.offset, header.in_file);
    fill(reinterpret_cast<void*>(header.address + header.in_file), 0, header.in_memory - header.in_file);
    heap = pages_of(header.address + header.in_memory) * kPage;
  }

  // Number of arguments, arguments, an empty environment, and the auxiliary vector: program headers, their size and
  // number, page size, 16 random bytes.
  uint64_t* const stack = reinterpret_cast<uint64_t*>(map(1 << 20) + (1 << 20) - kPage);
  uint64_t words = 1;
  for (char* at = reinterpret_cast<char*>(kArguments); *at; ++stack[0]) {
    stack[words++] = reinterpret_cast<uint64_t>(at);
    while (*at != ' ') ++at;
    *at++ = 0;
  }
  words += 2;
  const uint64_t auxiliary[] = {3, headers, 4, sizeof(Header), 5, count, 6, kPage, 25, kArguments, 0, 0};
  for (uint64_t word : auxiliary) stack[words++] = word;
  enter_program(entry, stack);
}
