//! The agent's state as it is written into a target: [`Settings`] as bytes.

use super::load::Settings;
use crate::addr::RemoteAddr;
use crate::agent_abi::{self as abi, State, may};
use crate::inferior::facts;
use std::mem::offset_of;
use std::time::Duration;

/// How long a controller may be silent before it is no longer waited for, and before it is taken for dead.
const PATIENCE: Duration = Duration::from_millis(300);
const DEAD_AFTER: Duration = Duration::from_secs(3);
/// `<asm/hwcap2.h>`: rdfsbase in user mode.
const HWCAP2_FSGSBASE: u64 = 2;
const AT_HWCAP2: u64 = 26;
const PAGE: usize = 4096;

/// Bytes of the stacks that threads told last, behind the state: of each that has a ring of its own.
pub(super) fn last_stacks_len(settings: &Settings) -> u64 {
    let rings = if settings.exact { settings.ring_count as usize - 1 } else { 0 };
    (rings * size_of::<abi::LastStack>()).next_multiple_of(PAGE) as u64
}

/// The state up to the slots; the rest is zero.
pub(super) fn state_bytes(
    settings: &Settings,
    rings: RemoteAddr,
    (state, directory): (RemoteAddr, RemoteAddr),
    pid: i32,
) -> Vec<u8> {
    let mut bytes = vec![0; offset_of!(State, slots)];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let ticks = |time: Duration| {
        let ticks = settings.ticks_per_second as u128 * time.as_nanos() / 1_000_000_000;
        (ticks as u64).to_le_bytes()
    };
    let mut flags = 0;
    if settings.may_call {
        flags |= may::MAKE_CALLS;
    }
    if settings.pass_on_tables {
        flags |= may::PASS_ON_TABLES;
    }
    if settings.pass_on_calloc {
        flags |= may::PASS_ON_CALLOC;
    }
    if facts::auxiliary(pid, AT_HWCAP2).is_some_and(|v| v & HWCAP2_FSGSBASE != 0) {
        flags |= may::READ_FS_BASE;
    }
    put(offset_of!(State, exact), &u32::from(settings.exact).to_le_bytes());
    put(offset_of!(State, magic), &abi::STATE_MAGIC.to_le_bytes());
    put(offset_of!(State, abi_version), &abi::ABI_VERSION.to_le_bytes());
    put(offset_of!(State, flags), &flags.to_le_bytes());
    put(offset_of!(State, rings), &rings.0.to_le_bytes());
    put(offset_of!(State, ring_count), &settings.ring_count.to_le_bytes());
    put(offset_of!(State, ring_len), &settings.ring_len.to_le_bytes());
    put(offset_of!(State, interval), &settings.interval.to_le_bytes());
    put(offset_of!(State, seed), &settings.seed.to_le_bytes());
    put(offset_of!(State, patience), &ticks(PATIENCE));
    put(offset_of!(State, dead_after), &ticks(DEAD_AFTER));
    put(offset_of!(State, max_wait), &ticks(settings.max_wait));
    put(offset_of!(State, tid_offset), &settings.tid_offset.to_le_bytes());
    put(offset_of!(State, python), &settings.python.to_bytes());
    if let Some(native) = &settings.native {
        let last_stacks = if settings.exact { state.0 + abi::NATIVE_AT as u64 } else { 0 };
        put(offset_of!(State, last_stacks), &last_stacks.to_le_bytes());
        put(offset_of!(State, native), &directory.0.to_le_bytes());
        put(offset_of!(State, stack_end), &native.stack_end.to_le_bytes());
    }
    for (i, [first, last]) in settings.internal_callers.iter().take(abi::INTERNAL_CALLERS).enumerate() {
        let at = offset_of!(State, internal_callers) + 16 * i;
        put(at, &first.to_le_bytes());
        put(at + 8, &last.to_le_bytes());
    }
    bytes
}
