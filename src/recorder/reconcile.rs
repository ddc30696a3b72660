//! [`Reconciler`]: the frees of samples that were not told.
//!
//! The agent enters a sampled block into a table before it tells of it, and takes it out before it tells that the block is given
//! back. What is told may be dropped for want of room; the table is right all the same. So a block that our books call live and
//! that the table does not have is given back, or a `realloc` of it is under way: it becomes a *suspect*. When everything that was
//! published until some time later is recorded and the block still lives by our books, its free is lost, and is made up for.
//!
//! Knows neither rings nor the target; who calls says when all is told, and brings the table.

use super::RecordError;
use super::ledger::Ledger;
use crate::addr::RemoteAddr;
use crate::capture::Block;
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// How long a thread may be held up between taking a block out of the table and publishing that it is freed. If it takes longer, the
/// free is told twice: the second time as one of a block from before.
const HELD_UP: Duration = Duration::from_millis(500);

/// The books of one recording, compared with the table now and then.
#[derive(Debug, Default)]
pub struct Reconciler {
    /// Something was dropped since the table was last read.
    is_due: bool,
    suspects: Vec<(RemoteAddr, Block)>,
    /// When the table was read.
    since: Option<Instant>,
    /// What was published by the suspects' threads is recorded.
    is_told: bool,
}

impl Reconciler {
    /// Events were dropped, frees may be among them.
    pub fn dropped(&mut self) {
        self.is_due = true;
    }

    /// All that was published until now is recorded.
    pub fn all_told(&mut self) {
        self.is_told |= self.since.is_some_and(|since| since.elapsed() > HELD_UP);
    }

    /// Takes the next step, if one is due. `table` reads the addresses in the agent's table, if that can be had.
    pub fn step(
        &mut self,
        ledger: &mut Ledger,
        table: impl FnOnce() -> Option<Vec<u64>>,
    ) -> Result<(), RecordError> {
        if self.is_told {
            self.settle(ledger)?;
        }
        if self.is_due
            && self.since.is_none()
            && ledger.live().has_samples()
            && let Some(table) = table()
        {
            self.is_due = false;
            self.suspect(ledger, &table);
        }
        Ok(())
    }

    /// Compares the books with the table, which was read after the last event in the books.
    pub fn suspect(&mut self, ledger: &Ledger, table: &[u64]) {
        let table: HashSet<u64> = table.iter().copied().collect();
        self.suspects = ledger.live().samples().filter(|(address, _)| !table.contains(&address.0)).collect();
        self.since = Some(Instant::now());
        self.is_told = false;
    }

    /// Nothing more will be told of the suspects: those that still live have been freed.
    pub fn settle(&mut self, ledger: &mut Ledger) -> Result<(), RecordError> {
        (self.since, self.is_told) = (None, false);
        for (address, block) in std::mem::take(&mut self.suspects) {
            // Another block at that address is another matter.
            if ledger.live().block(address) == Some(block) {
                ledger.lost_free(address)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::{CaptureWriter, Header, StackId};
    use crate::probe::calls::Observation;
    use crate::probe::function::{Answer, Function, Request};
    use crate::recorder::ledger::Origin;

    struct Books {
        ledger: Ledger,
        _folder: tempfile::TempDir,
    }

    impl Books {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let header = Header { sampling_mean_bytes: Some(1000), ..Header::default() };
            let writer = CaptureWriter::create(folder.path().join("c"), false, &header).unwrap();
            Self { ledger: Ledger::new(writer, 4096), _folder: folder }
        }

        fn allocate(&mut self, address: u64, interval: u64) {
            let call = Observation::Ended {
                function: Function::Malloc,
                request: Request::Allocate { size: Some(64) },
                answer: Answer::Address(RemoteAddr(address)),
            };
            self.ledger.observe(1, call, Origin { stack: StackId::EMPTY, interval }).unwrap();
        }

        fn free(&mut self, address: u64) {
            let call = Observation::Freed { function: Function::Free, address: RemoteAddr(address) };
            self.ledger.observe(1, call, Origin::default()).unwrap();
        }

        fn live(&self) -> Vec<u64> {
            let mut live: Vec<u64> = self.ledger.live().samples().map(|(address, _)| address.0).collect();
            live.sort_unstable();
            live
        }
    }

    #[test]
    fn only_what_neither_the_table_nor_a_free_explains_was_lost() {
        let mut books = Books::new();
        for address in [0x10, 0x20, 0x30, 0x40] {
            books.allocate(address, 1000);
        }
        let mut reconciler = Reconciler::default();
        reconciler.suspect(&books.ledger, &[0x10, 0x50]);
        // Its free was published a moment later; and one that was given out anew since.
        books.free(0x20);
        books.free(0x30);
        books.ledger.time(5_000_000);
        books.allocate(0x30, 1000);
        reconciler.settle(&mut books.ledger).unwrap();
        assert_eq!(books.live(), [0x10, 0x30]);
        assert_eq!(books.ledger.tally().missed_frees, 1);
        assert_eq!(books.ledger.writer().counters().frees_from_before, 0);
    }

    #[test]
    fn nothing_is_asked_without_a_drop_and_nothing_settled_before_all_is_told() {
        let mut books = Books::new();
        books.allocate(0x10, 1000);
        let mut reconciler = Reconciler::default();
        reconciler.step(&mut books.ledger, || panic!("nothing was dropped")).unwrap();
        reconciler.dropped();
        // The target is gone: some other time.
        reconciler.step(&mut books.ledger, || None).unwrap();
        reconciler.step(&mut books.ledger, || Some(vec![])).unwrap();
        // At once: a thread may be held up.
        reconciler.all_told();
        reconciler.step(&mut books.ledger, || panic!("it was read already")).unwrap();
        assert_eq!(books.live(), [0x10]);
        std::thread::sleep(HELD_UP);
        reconciler.step(&mut books.ledger, || panic!("it was read already")).unwrap();
        assert_eq!(books.live(), [0x10]);
        reconciler.all_told();
        reconciler.step(&mut books.ledger, || panic!("it was read already")).unwrap();
        assert!(books.live().is_empty());
    }

    #[test]
    fn what_was_recorded_for_certain_is_in_no_table() {
        let mut books = Books::new();
        books.allocate(0x10, 0);
        let mut reconciler = Reconciler::default();
        reconciler.suspect(&books.ledger, &[]);
        reconciler.settle(&mut books.ledger).unwrap();
        assert!(books.ledger.live().is_live(RemoteAddr(0x10)));
    }
}
