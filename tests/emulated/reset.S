# From the processor's reset to start_machine in 64 bits, all vector and tile state on.
        .section .reset, "ax"
        .code16
        ljmp $0xf000, $(start - 0xf0000)                # below 1 MB, where addresses are those of the linker

        .text
        .globl start
start:  cli
        movw $0xf000, %ax
        movw %ax, %ds
        lgdtl gdt_pointer - 0xf0000
        movl $0x11, %eax
        movl %eax, %cr0
        ljmpl $24, $1f
        .code32
1:      movl $16, %eax
        movl %eax, %ds
        movl %eax, %es
        movl %eax, %ss
        movl $bss_begin, %edi
        movl $bss_end, %ecx
        subl %edi, %ecx
        xorl %eax, %eax
        rep stosb
        # Memory as it is, 1 GB in pages of 2 MB.
        movl $pdpt + 3, pml4
        movl $pd + 3, pdpt
        movl $pd, %edi
        movl $0x83, %eax
2:      movl %eax, (%edi)
        addl $8, %edi
        addl $0x200000, %eax
        cmpl $0x40000083, %eax
        jne 2b
        movl $0x40620, %eax                             # PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
        movl %eax, %cr4
        movl $pml4, %eax
        movl %eax, %cr3
        movl $0xc0000080, %ecx                          # EFER: system calls, long mode
        rdmsr
        orl $0x101, %eax
        wrmsr
        movl $0x80010033, %eax                          # paging, write protection, numeric errors, protection
        movl %eax, %cr0
        ljmpl $8, $3f
        .code64
3:      movl $0xd, %eax                                 # XCR0: all of x87, SSE, AVX, AVX-512 and AMX there is
        xorl %ecx, %ecx
        cpuid
        andl $0x600e7, %eax
        xorl %edx, %edx
        xorl %ecx, %ecx
        xsetbv
        fninit
        movl $stack_end, %esp
        call start_machine

        .globl enter_program
enter_program:                                          # (entry, stack)
        movq %rsi, %rsp
        xorl %edx, %edx
        xorl %ebp, %ebp
        jmp *%rdi

# The program runs in ring 0, too, so `syscall` changes neither ring nor stack.
        .globl system_call
system_call:
        movq %rsp, program_stack
        movl $stack_end, %esp
        pushq %rcx
        pushq %r11
        pushq %rdi
        pushq %rsi
        pushq %rdx
        pushq %r10
        pushq %r8
        pushq %r9
        movq %r10, %r8
        movq %rdx, %rcx
        movq %rsi, %rdx
        movq %rdi, %rsi
        movq %rax, %rdi
        call answer                                     # (number, the first four arguments)
        popq %r9
        popq %r8
        popq %r10
        popq %rdx
        popq %rsi
        popq %rdi
        popq %r11
        popq %rcx
        movq program_stack, %rsp
        jmp *%rcx

        .align 16
        .globl exceptions
exceptions:
        .set i, 0
        .rept 32
        pushq $i
        jmp 4f
        .align 16
        .set i, i + 1
        .endr
4:      movq %rsp, %rdi
        movl $stack_end, %esp
        call fail

        .section .rodata
        .align 16
gdt:    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
gdt_pointer:
        .word 31
        .long gdt

        .section .note.GNU-stack, "", @progbits
        .bss
        .align 4096
        .globl pml4
pml4:   .skip 4096
pdpt:   .skip 4096
pd:     .skip 4096
        .skip 65536
stack_end:
program_stack: .skip 8
