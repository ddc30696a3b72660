//! Probes: which allocator entry points ([`plan`]), and the two kinds that observe them.
//!
//! * trap: thunks behind int3s ([`region`]), planting ([`install`]) and lifting them ([`lift`]), what a hit means ([`calls`]);
//! * jump: where a jump goes ([`detour`]), what lies near it ([`near`]), the agent's image ([`agent_image`]) and what it is told
//!   of the process's CPython ([`agent_facts`]), loading ([`load`]), planting and lifting ([`jump`]), the controller's end of the
//!   agent's rings ([`ring`]).
//!
//! [`stale`] removes what a killed heaptap of either kind left behind.
//!
//! Knows functions and calling conventions. Knows nothing of Python stacks, captures or reports.

pub mod agent_facts;
pub mod agent_image;
mod agent_state;
pub mod calls;
pub mod detour;
pub mod error;
pub mod function;
mod handler;
pub mod head;
pub mod hooks;
pub mod install;
pub mod internal_callers;
pub mod jump;
pub mod lift;
pub mod load;
pub mod native_area;
pub mod near;
pub mod place;
pub mod plan;
pub mod references;
pub mod region;
pub mod ring;
pub mod ring_record;
pub mod signal_frames;
pub mod stale;
