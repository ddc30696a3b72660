//! What a child has inherited of its parent's recording: jumps that only pass calls on, and the code behind them. Whoever records
//! the child takes it out; from one that was not recorded, and lives on, it is taken out here.

use super::one::runs_in_its_parents_memory;
use crate::inferior::error::TraceError;
use crate::inferior::memory::ProcessMemory;
use crate::inferior::{Inferior, facts, maps};
use crate::probe::stale;
use crate::recorder::RecordError;

/// Takes out of process `pid` what it has inherited, if anything. Not while children of ours are waited for by others: tracing
/// waits for any child.
pub(super) fn remove(pid: i32) -> Result<(), RecordError> {
    facts::check_attachable(pid)?;
    if runs_in_its_parents_memory(pid) {
        return Ok(());
    }
    let found = stale::find_in(pid, &ProcessMemory::new(pid), &maps::mappings(pid)?);
    if found.is_empty() || found.iter().any(stale::Stale::controller_lives) {
        return Ok(());
    }
    let mut inferior = Inferior::seize(pid)?;
    let removed = inferior
        .stop_to_attach()
        .map_err(RecordError::from)
        .and_then(|()| Ok(stale::remove(&mut inferior, &found)?));
    match inferior.detach() {
        Ok(()) | Err(TraceError::Gone { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    match removed?.why.first() {
        Some(why) => Err(RecordError::NotRecordable {
            pid,
            why: format!(
                "what it inherited can't be removed yet ({why}); `heaptap detach --pid {pid}` does it later"
            ),
        }),
        None => Ok(()),
    }
}
