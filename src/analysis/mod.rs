//! What a capture says: high-water mark, leaks, temporary allocations, totals.
//!
//! Pure functions over records, in one pass, with memory bounded by live blocks and distinct sites.
//! Knows nothing of files' bytes (`capture`) or of how an answer looks (`report`).

mod call_tree;
mod functions;
mod high_water_mark;
mod replay;
mod site;
mod statistics;
mod temporary;

pub use call_tree::{CallTree, NodeTotals};
pub use functions::{FunctionRow, functions};
pub use high_water_mark::HighWaterMark;
pub use replay::{Findings, Missing, Replay, View, analyse};
pub use site::{Site, SiteTotals, Totals};
pub use statistics::{AllocatorTotals, LocationTotals, SizeBin, Statistics, locations};
pub use temporary::Temporary;
