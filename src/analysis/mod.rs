//! What a capture says: high-water mark, leaks, temporary allocations, totals, growth.
//!
//! Pure functions over records, in one pass, with memory bounded by live blocks and distinct sites. Where records are samples,
//! all sums are estimates that know their error.
//! Knows nothing of files' bytes (`capture`) or of how an answer looks (`report`).

mod call_tree;
mod diff;
mod family;
mod functions;
mod gauges;
mod grouping;
mod high_water_mark;
mod leaks;
mod merge;
mod moments;
mod moved;
mod package;
mod replay;
mod site;
mod snapshots;
mod states;
mod statistics;
mod temporary;
mod trend;

pub use crate::capture::Totals;
pub use call_tree::{CallTree, NodeTotals};
pub use diff::{Change, Diff, DiffOptions, DiffRow, diff};
pub use family::Family;
pub use functions::{FunctionRow, functions};
pub use gauges::{GaugeSeries, Growth, gauge_series};
pub use grouping::{Filter, FrameName, GroupName, Grouping, Pattern, Subject};
pub use high_water_mark::HighWaterMark;
pub use leaks::{Leaks, ProcessGrowth, SiteVerdict, TooLittle, Verdict, leaks};
pub use merge::{Merge, Merged, MergedProcess};
pub use moments::{Moment, NoSuchMoment, Outline, When};
pub use replay::{Findings, Missing, Replay, Samples, View, analyse, analyse_seeing};
pub use site::SiteTotals;
pub use snapshots::{LiveAt, OfSnapshot};
pub use statistics::{AllocatorTotals, LocationTotals, SizeBin, Statistics, locations};
pub use temporary::Temporary;
pub use trend::{Point, Rate, Shape, Trend};
