//! [`CallTree`]: sites merged into the tree of callers.
//!
//! A capture's stacks are a tree already (a parent's id is below its child's), so sums flow up it
//! in one sweep from the highest id to the lowest: no recursion, however deep a stack is.

use super::site::SiteTotals;
use crate::capture::Totals;
use crate::capture::{FrameId, StackId, StackTable};

/// Sums of one node: its own allocations, and those with all its callees'.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct NodeTotals {
    /// Allocations made by this very frame.
    pub own: Totals,
    /// With those below it.
    pub total: Totals,
}

/// The caller tree of some sites. Nodes are stacks; [`StackId::EMPTY`] is the root.
pub struct CallTree {
    nodes: Vec<NodeTotals>,
    /// Children with allocations, grouped by parent: `children[starts[p]..starts[p + 1]]`.
    starts: Vec<u32>,
    children: Vec<StackId>,
    frames: Vec<Option<FrameId>>,
}

impl CallTree {
    /// Merges `sites`. Stacks that were lost become one node below the root.
    pub fn new(sites: &[SiteTotals], stacks: &StackTable) -> Self {
        let lost = stacks.stack_count() + 1;
        let mut nodes = vec![NodeTotals::default(); lost + 1];
        for row in sites {
            nodes[(row.site.stack.0 as usize).min(lost)].own.add(row.totals);
        }
        let links: Vec<_> = (0..=lost).map(|id| stacks.node(StackId(id as u32)).unzip()).collect();
        for id in (0..=lost).rev() {
            let own = nodes[id].own;
            nodes[id].total.add(own);
            if let Some(parent) = links[id].1 {
                let total = nodes[id].total;
                nodes[parent.0 as usize].total.add(total);
            }
        }
        let mut starts = vec![0u32; lost + 2];
        let used = |id: usize| !nodes[id].total.is_empty();
        for parent in (1..=lost).filter(|id| used(*id)).filter_map(|id| links[id].1) {
            starts[parent.0 as usize + 1] += 1;
        }
        for at in 1..starts.len() {
            starts[at] += starts[at - 1];
        }
        let mut next = starts.clone();
        let mut children = vec![StackId::EMPTY; starts[lost + 1] as usize];
        for id in (1..=lost).filter(|id| used(*id)) {
            if let Some(parent) = links[id].1 {
                let slot = &mut next[parent.0 as usize];
                children[*slot as usize] = StackId(id as u32);
                *slot += 1;
            }
        }
        let frames = links.into_iter().map(|(frame, _)| frame).collect();
        let mut tree = Self { nodes, starts, children, frames };
        tree.sort();
        tree
    }

    /// Sums of a node.
    pub fn totals(&self, node: StackId) -> NodeTotals {
        self.nodes[node.0 as usize]
    }

    /// The frame of a node; `None` for the root.
    pub fn frame(&self, node: StackId) -> Option<FrameId> {
        self.frames[node.0 as usize]
    }

    /// Callees with allocations, biggest first.
    pub fn children(&self, node: StackId) -> &[StackId] {
        let at = node.0 as usize;
        &self.children[self.starts[at] as usize..self.starts[at + 1] as usize]
    }

    fn sort(&mut self) {
        for at in 0..self.nodes.len() {
            let (start, end) = (self.starts[at] as usize, self.starts[at + 1] as usize);
            let nodes = &self.nodes;
            self.children[start..end]
                .sort_by(|a, b| nodes[b.0 as usize].total.compare(&nodes[a.0 as usize].total).then(a.cmp(b)));
        }
    }
}
