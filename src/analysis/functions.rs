//! Sums per function: what it allocated itself, and with all it called.

use super::call_tree::CallTree;
use crate::capture::Totals;
use crate::capture::{FrameId, StackId, StackTable};
use foldhash::fast::RandomState;
use std::collections::HashMap;

/// One function's part.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct FunctionRow {
    /// A frame of the function (its name and file are the function's, its line is any);
    /// `None` for allocations without a Python stack.
    pub frame: Option<FrameId>,
    /// Allocated by the function itself.
    pub own: Totals,
    /// With everything it called; a recursive function's allocations count once.
    pub total: Totals,
}

/// A function is a name in a file. Lost frames are one function.
type Key = Option<(u32, u32)>;

/// Every function of the tree, in no order.
pub fn functions(tree: &CallTree, stacks: &StackTable) -> Vec<FunctionRow> {
    let mut ids: HashMap<Key, usize, RandomState> = HashMap::default();
    let mut rows: Vec<FunctionRow> = Vec::new();
    // How often each function is on the path to where the walk is.
    let mut active: Vec<u32> = Vec::new();
    let root = tree.totals(StackId::EMPTY).own;
    enum Step {
        Enter(StackId),
        Leave(usize),
    }
    let mut steps: Vec<Step> = tree.children(StackId::EMPTY).iter().map(|id| Step::Enter(*id)).collect();
    while let Some(step) = steps.pop() {
        let node = match step {
            Step::Enter(node) => node,
            Step::Leave(function) => {
                active[function] -= 1;
                continue;
            }
        };
        let Some(frame) = tree.frame(node) else { continue };
        let key = stacks.frame_ids(frame).map(|(function, file, _)| (function.0, file.0));
        let function = *ids.entry(key).or_insert(rows.len());
        if function == rows.len() {
            rows.push(FunctionRow { frame: Some(frame), own: Totals::default(), total: Totals::default() });
            active.push(0);
        }
        let totals = tree.totals(node);
        rows[function].own.add(totals.own);
        if active[function] == 0 {
            rows[function].total.add(totals.total);
        }
        active[function] += 1;
        steps.push(Step::Leave(function));
        steps.extend(tree.children(node).iter().map(|id| Step::Enter(*id)));
    }
    if !root.is_empty() {
        rows.push(FunctionRow { frame: None, own: root, total: root });
    }
    rows
}

#[cfg(test)]
#[path = "functions_tests.rs"]
mod tests;
