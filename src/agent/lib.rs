//! The agent: what runs in the target. Built by `build.rs` into a self-contained image, mapped by the controller
//! (`probe::load`), entered from the thunks of hooked functions ([`entry`]).
//!
//! It has no libc, no statics, no thread-local storage; all it knows is in the [`abi::State`] that a hook's descriptor names.
//! It never allocates, never takes a lock of the target's, never calls out, and touches no vector register: the hooked functions'
//! callers may rely on more registers being kept than the ABI promises (GCC's `-fipa-ra` within one file of libc).
//! A panic can't be: the handler calls a function that does not exist, so the image would not link.
#![no_std]
#![allow(unsafe_op_in_unsafe_fn, reason = "everything here is about raw memory of a process not ours")]

#[path = "../agent_abi.rs"]
#[allow(dead_code, reason = "the controller uses the rest")]
mod abi;
mod codes;
mod entry;
mod exact;
mod hooks;
mod last_stack;
mod machine;
mod native;
mod python;
mod ring;
mod sample;
mod slot;
mod stacks;
#[path = "../unwind_abi.rs"]
#[allow(dead_code, reason = "the controller makes the rules")]
mod unwind_abi;

unsafe extern "C" {
    fn the_agent_must_not_panic() -> !;
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // SAFETY: never linked, see above.
    unsafe { the_agent_must_not_panic() }
}
