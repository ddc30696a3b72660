//! [`parts`]: where the code of one function is. Compilers put what is rarely executed (or what a profile says is) elsewhere, and a stripped
//! file has no name for it.
//!
//! Such a part has an unwind entry of its own, as a function has. What tells them apart: a function is jumped to, if at all, at its
//! first instruction, and a part at many.

use crate::addr::RemoteAddr;
use crate::image::Module;
use iced_x86::{Decoder, DecoderOptions, FlowControl, OpKind};
use std::ops::Range;

/// Bytes of a function that are decoded: CPython's loop, the largest there is, has some 100 KiB.
const MOST_BYTES: u64 = 1 << 22;

/// The function at `start` of `size` bytes, and its other parts.
pub fn parts(module: &Module, start: RemoteAddr, size: u64) -> Vec<Range<RemoteAddr>> {
    let whole = start..start.offset(size.min(MOST_BYTES));
    let mut found = vec![whole.clone()];
    let Some(bytes) = module.file_bytes(start, whole.end.since(start) as usize) else { return found };
    let starts = module.function_starts();
    let decoder = Decoder::with_ip(64, &bytes, start.0, DecoderOptions::NONE);
    let leaves = decoder.into_iter().filter(|instruction| {
        let jumps = matches!(
            instruction.flow_control(),
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
        );
        jumps && instruction.op0_kind() == OpKind::NearBranch64
    });
    for target in leaves.map(|instruction| RemoteAddr(instruction.near_branch_target())) {
        if found.iter().any(|part| part.contains(&target)) {
            continue;
        }
        let after = starts.partition_point(|start| *start <= target);
        let Some(begin) = after.checked_sub(1).map(|before| starts[before]) else { continue };
        // Of the last one nobody says how long it is.
        if begin != target
            && let Some(end) = starts.get(after)
        {
            found.push(begin..*end);
        }
    }
    found
}
