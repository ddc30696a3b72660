//! What a capture says: high-water mark, leaks, temporary allocations, totals.
//!
//! Pure functions over records, in one pass, with memory bounded by live blocks and distinct sites. Where records are samples,
//! all sums are estimates that know their error.
//! Knows nothing of files' bytes (`capture`) or of how an answer looks (`report`).

mod call_tree;
mod functions;
mod gauges;
mod high_water_mark;
mod replay;
mod site;
mod snapshots;
mod statistics;
mod temporary;

pub use crate::capture::Totals;
pub use call_tree::{CallTree, NodeTotals};
pub use functions::{FunctionRow, functions};
pub use gauges::{GaugeSeries, Growth, gauge_series};
pub use high_water_mark::HighWaterMark;
pub use replay::{Findings, Missing, Replay, Samples, View, analyse};
pub use site::{Site, SiteTotals};
pub use snapshots::{LiveAt, OfSnapshot};
pub use statistics::{AllocatorTotals, LocationTotals, SizeBin, Statistics, locations};
pub use temporary::Temporary;
