//! The machine: time stamp counter, thread pointer, raw system calls. Instructions only.

use core::arch::asm;

/// The time stamp counter. Not ordered with other instructions (Intel SDM, RDTSC): see the controller's merge.
#[inline(always)]
pub fn ticks() -> u64 {
    let (low, high): (u64, u64);
    // SAFETY: reads a counter.
    unsafe { asm!("rdtsc", out("rax") low, out("rdx") high, options(nomem, nostack, preserves_flags)) };
    high << 32 | low
}

/// The first word of the thread's control block: its own address (x86-64 TLS ABI).
///
/// # Safety
/// The thread has a control block.
#[inline(always)]
pub unsafe fn thread_pointer() -> u64 {
    let fs: u64;
    asm!("mov {}, fs:[0]", out(reg) fs, options(nostack, preserves_flags, readonly));
    fs
}

/// The base of fs by `rdfsbase`; 0 for a thread without a control block.
///
/// # Safety
/// The kernel allows the instruction (AT_HWCAP2 bit 1).
pub unsafe fn fs_base() -> u64 {
    let fs: u64;
    asm!("rdfsbase {}", out(reg) fs, options(nomem, nostack, preserves_flags));
    fs
}

/// Asks for the cache line at `at`, to be written (PREFETCHW; processors without it take it for no operation). Cannot fault.
#[inline(always)]
pub fn fetch_to_write(at: *const u8) {
    // SAFETY: a hint.
    unsafe { asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly)) };
}

/// A system call of up to two arguments; the raw result. Changes no errno.
///
/// # Safety
/// The call must be harmless for the thread.
pub unsafe fn call(number: u64, a: u64, b: u64) -> u64 {
    let result: u64;
    asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b,
        out("rcx") _, out("r11") _, options(nostack));
    result
}

/// Whether the page at `page` can be read: asks the kernel to copy a signal mask from there (rt_sigprocmask), which it refuses to set in
/// a way that doesn't exist. Changes nothing.
///
/// # Safety
/// System calls are allowed.
pub unsafe fn is_readable(page: u64) -> bool {
    const NO_SUCH_WAY: u64 = 99;
    const EINVAL: u64 = 22;
    let result: u64;
    asm!("syscall", inlateout("rax") 14_u64 => result, in("rdi") NO_SUCH_WAY, in("rsi") page, in("rdx") 0_u64, in("r10") 8_u64,
        out("rcx") _, out("r11") _, options(nostack));
    result == EINVAL.wrapping_neg()
}

/// `nanosleep` for so many nanoseconds (below a second); may return early.
///
/// # Safety
/// System calls are allowed.
pub unsafe fn sleep(nanoseconds: u64) {
    let time = [0, nanoseconds];
    call(35, time.as_ptr() as u64, 0);
}

/// Whether there is no thread with this id (`tkill` without a signal: ESRCH).
///
/// # Safety
/// System calls are allowed.
pub unsafe fn is_gone(tid: u32) -> bool {
    call(200, u64::from(tid), 0) as i64 == -3
}

/// Whether the thread runs on its alternate signal stack (`sigaltstack`, SS_ONSTACK).
///
/// # Safety
/// System calls are allowed.
pub unsafe fn on_alternate_stack() -> bool {
    let mut stack = [0_u64; 3];
    let failed = call(131, 0, stack.as_mut_ptr() as u64);
    failed == 0 && stack[1] as u32 & 1 != 0
}

/// The base of fs by `arch_prctl(ARCH_GET_FS)`.
///
/// # Safety
/// System calls are allowed.
pub unsafe fn fs_base_by_call() -> u64 {
    let mut fs = 0_u64;
    call(158, 0x1003, &raw mut fs as u64);
    fs
}
