//! A way home for a thread that we send on an errand: a signal frame on its own stack that restores it.
//!
//! While a thread makes a system call in our name its registers are ours. Should heaptap be killed in that
//! moment, the kernel lets the thread run on with them. So before they are set, the frame that
//! rt_sigreturn(2) takes is written below the thread's red zone, and the call is made from a `syscall; ret`
//! with the stack pointer at that frame: untraced, the `ret` leads to the `mov $15, %rax; syscall` that every libc
//! has for signal handlers to return through, and the kernel restores registers, vector state and signal
//! mask from the frame. Traced, nothing of it is used.
//!
//! Pure: builds bytes. Source: arch/x86/kernel/signal_64.c, arch/x86/include/uapi/asm/sigcontext.h.

use super::sys::{Registers, xsave_len};
use crate::addr::RemoteAddr;

/// The x86_64 ABI's red zone: bytes below the stack pointer that are the thread's.
const RED_ZONE: u64 = 128;
/// `struct _fpx_sw_bytes`: where it lies in the FXSAVE area, and its magics.
const SW_BYTES_AT: usize = 464;
const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
/// XSTATE_BV in the XSAVE header: the features that are in use.
const XSTATE_BV_AT: usize = 512;
/// AMX: a thread has room for it in its signal frames only after it asked the kernel (arch_prctl(2)).
const AMX_TILES: u64 = 1 << 17 | 1 << 18;
const UC_FP_XSTATE: u64 = 1;
const UC_SIGCONTEXT_SS: u64 = 2;
const UC_STRICT_RESTORE_SS: u64 = 4;
/// pretcode, then struct ucontext: flags, link, stack (24), sigcontext (256), sigmask.
const UCONTEXT_AT: usize = 8;
const STACK_AT: usize = UCONTEXT_AT + 16;
const SIGCONTEXT_AT: usize = UCONTEXT_AT + 40;
const SIGMASK_AT: usize = SIGCONTEXT_AT + 256;
const FRAME_LEN: usize = SIGMASK_AT + 8;
/// Errors with which the kernel marks an interrupted call that it will restart (include/linux/errno.h).
const ERESTARTSYS: u64 = 512;
const ERESTARTNOINTR: u64 = 513;
const ERESTARTNOHAND: u64 = 514;
const ERESTART_RESTARTBLOCK: u64 = 516;

/// Bytes to be written to a stack, and the stack pointer that makes them a signal frame.
#[derive(Debug, Clone)]
pub struct Frame {
    /// Where the bytes go; the stack pointer of the errand.
    pub at: RemoteAddr,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Whether registers are those of a system call that was interrupted and will restart.
pub fn restarts(regs: &Registers) -> bool {
    let error = regs.rax.wrapping_neg();
    regs.orig_rax as i64 >= 0
        && matches!(error, ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND | ERESTART_RESTARTBLOCK)
}

/// The frame that restores a thread with these registers, blocked signals and extended state, and whose `ret`
/// leads to `restorer`.
pub fn frame(regs: &Registers, mask: u64, xstate: &[u8], restorer: RemoteAddr) -> Option<Frame> {
    let xstate = signal_xstate(xstate)?;
    let xstate_at = regs.rsp.checked_sub(RED_ZONE + xstate.len() as u64)? & !63;
    let at = xstate_at.checked_sub(FRAME_LEN as u64 + 8)? & !15;
    let mut bytes = vec![0; (xstate_at - at) as usize];
    put(&mut bytes, 0, restorer.0);
    put(&mut bytes, UCONTEXT_AT, UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS);
    // An alternate stack with flags that do not exist: the kernel refuses it, silently, and keeps its own.
    put(&mut bytes, STACK_AT + 8, 0x7fff_ffff);
    for (i, word) in sigcontext(regs, xstate_at).into_iter().enumerate() {
        put(&mut bytes, SIGCONTEXT_AT + i * 8, word);
    }
    put(&mut bytes, SIGMASK_AT, mask);
    bytes.extend(xstate);
    Some(Frame { at: RemoteAddr(at), bytes })
}

fn put(bytes: &mut [u8], at: usize, word: u64) {
    bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
}

fn sigcontext(regs: &Registers, fpstate: u64) -> [u64; 24] {
    // An interrupted call that the kernel would have restarted on its way out is made again from its
    // instruction: a sleep then sleeps its whole time again.
    let (rax, rip) = if restarts(regs) { (regs.orig_rax, regs.rip - 2) } else { (regs.rax, regs.rip) };
    let segments = (regs.cs & 0xffff) | (regs.ss & 0xffff) << 48;
    [
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
        regs.rdi,
        regs.rsi,
        regs.rbp,
        regs.rbx,
        regs.rdx,
        rax,
        regs.rcx,
        regs.rsp,
        rip,
        regs.eflags,
        segments,
        0,
        0,
        0,
        0,
        fpstate,
    ]
}

/// An XSAVE image as a signal frame holds it: with the magics that tell it from a bare FXSAVE area, and no
/// longer than what the kernel itself would write for this thread, else it restores the FXSAVE part alone.
fn signal_xstate(image: &[u8]) -> Option<Vec<u8>> {
    let word = |at: usize| Some(u64::from_le_bytes(image.get(at..at + 8)?.try_into().ok()?));
    // The ptrace regset carries the enabled features where the frame has its software bytes.
    let mut features = word(SW_BYTES_AT)?;
    if word(XSTATE_BV_AT)? & AMX_TILES == 0 {
        features &= !AMX_TILES;
    }
    let mut image = image.get(..xsave_len(features))?.to_vec();
    let len = image.len() as u32;
    let sw = &mut image[SW_BYTES_AT..SW_BYTES_AT + 48];
    sw.fill(0);
    sw[0..4].copy_from_slice(&FP_XSTATE_MAGIC1.to_le_bytes());
    sw[4..8].copy_from_slice(&(len + 4).to_le_bytes());
    sw[8..16].copy_from_slice(&features.to_le_bytes());
    sw[16..20].copy_from_slice(&len.to_le_bytes());
    image.extend(FP_XSTATE_MAGIC2.to_le_bytes());
    Some(image)
}

#[cfg(test)]
mod tests {
    use super::super::sys::no_registers;
    use super::*;

    #[test]
    fn the_frame_lies_below_the_red_zone_and_its_vector_state_is_aligned() {
        let regs = Registers { rsp: 0x7fff_0000_1238, rip: 0x1000, ..no_registers() };
        let frame = frame(&regs, 5, &[0; 2696], RemoteAddr(0xabc)).unwrap();
        let end = frame.at.0 + frame.bytes.len() as u64;
        assert!(end <= regs.rsp - RED_ZONE, "{end:#x}");
        let fpstate = u64::from_le_bytes(frame.bytes[SIGCONTEXT_AT + 23 * 8..][..8].try_into().unwrap());
        assert_eq!(fpstate % 64, 0);
        assert_eq!(frame.at.0 + (frame.bytes.len() - 580) as u64, fpstate);
        assert_eq!(frame.bytes[..8], 0xabc_u64.to_le_bytes());
    }

    #[test]
    fn an_interrupted_call_is_made_again() {
        let blocked = Registers { orig_rax: 7, rax: 516_u64.wrapping_neg(), rip: 0x1002, ..no_registers() };
        assert!(restarts(&blocked));
        let words = sigcontext(&blocked, 0);
        assert_eq!((words[13], words[16]), (7, 0x1000));
        let running = Registers { orig_rax: u64::MAX, rax: 516_u64.wrapping_neg(), ..no_registers() };
        assert!(!restarts(&running));
    }

    #[test]
    fn a_processor_without_extended_state_gets_no_frame() {
        assert!(frame(&no_registers(), 0, &[0; 512], RemoteAddr(1)).is_none());
    }
}
