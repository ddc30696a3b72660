//! x
use crate::abi::State;
pub unsafe fn is_told(_s: *const State, _c: u64, _g: u32) -> bool { true }
pub unsafe fn mark_told(_s: *mut State, _c: u64, _g: u32) {}
pub unsafe fn tell(_s: *const State, _c: u64, _g: u32, emit: &mut impl FnMut(&[u64; 4], *const u8, usize) -> bool) -> bool { emit(&[0;4], core::ptr::null(), 0) }
