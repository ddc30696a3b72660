//! [`Translator`]: from the agent's events to the observations that both kinds of breakpoints make.
//!
//! A call that begins and ends is two records; the request is in the first, the answer in the second.

use crate::addr::RemoteAddr;
use crate::agent_abi::NOT_SAMPLED;
use crate::probe::calls::Observation;
use crate::probe::function::{Answer, Function, Member, Request};
use crate::probe::ring_record::{Event, What};

/// Calls under way that are remembered: threads that died in one leave theirs behind.
const MAX_BEGUN: usize = 4096;

/// What an event comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translated {
    /// The observation.
    pub observation: Observation,
    /// Hash of the stack of what was given out; 0 for none.
    pub stack: u64,
    /// Interval of the sample; 0 where every event is recorded.
    pub interval: u64,
}

/// The calls under way.
#[derive(Debug, Default)]
pub struct Translator {
    begun: Vec<(u32, Function, Request)>,
}

impl Translator {
    /// What `event` comes to; `None` for one that is no call.
    #[inline]
    pub fn translate(&self, event: &Event) -> Option<Translated> {
        let plain = |observation| Some(Translated { observation, stack: 0, interval: 0 });
        match event.what {
            What::Thread(_) => None,
            What::Freed { function, address } => plain(Observation::Freed { function, address }),
            What::FreedInside { function, address } => plain(Observation::FreedInside { function, address }),
            What::Allocated { function, address, size, stack, interval } => {
                let request = allocation(function, size);
                let answer = request.answer(address.0);
                let observation = Observation::Ended { function, request, answer };
                Some(Translated { observation, stack, interval })
            }
            What::Begins { function, args } => plain(match request(function, args) {
                Some(request) => Observation::Begins { function, request },
                None => Observation::Unmatched,
            }),
            What::Ended { function, result, stack, interval } => {
                Some(self.ended(event.tid, function, result, stack, interval))
            }
        }
    }

    /// The event has been recorded.
    #[inline]
    pub fn recorded(&mut self, event: &Event) {
        match event.what {
            What::Begins { function, args } => {
                self.begun.retain(|(tid, ..)| *tid != event.tid);
                if self.begun.len() >= MAX_BEGUN {
                    self.begun.remove(0);
                }
                self.begun.extend(request(function, args).map(|request| (event.tid, function, request)));
            }
            What::Ended { .. } => self.begun.retain(|(tid, ..)| *tid != event.tid),
            _ => {}
        }
    }

    fn ended(&self, tid: u32, function: Function, result: u64, stack: u64, interval: u64) -> Translated {
        let begun = self.begun.iter().find(|(of, which, _)| (*of, *which) == (tid, function));
        let Some((.., request)) = begun.copied() else {
            return Translated { observation: Observation::Unmatched, stack: 0, interval: 0 };
        };
        let mut answer = request.answer(result);
        // The old block was a sample and is gone; the new one is none.
        if interval == NOT_SAMPLED && matches!(answer, Answer::Address(_)) {
            answer = Answer::Done;
        }
        let interval = if interval == NOT_SAMPLED { 0 } else { interval };
        Translated { observation: Observation::Ended { function, request, answer }, stack, interval }
    }
}

/// The request of a call that is told only by what it gave out.
fn allocation(function: Function, size: u64) -> Request {
    if function.is_mapping() { Request::Map { len: size } } else { Request::Allocate { size: Some(size) } }
}

/// The request of a call that may give something back.
fn request(function: Function, [a, b, c]: [u64; 3]) -> Option<Request> {
    match function {
        Function::Realloc | Function::Python(_, Member::Realloc) => {
            Some(Request::Reallocate { old: RemoteAddr(a), size: b })
        }
        Function::Munmap => Some(Request::Unmap { address: RemoteAddr(a), len: b }),
        Function::Mremap => Some(Request::Remap { old: RemoteAddr(a), old_len: b, len: c }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(tid: u32, what: What) -> Event {
        Event { stamp: 0, tid, number: 0, what }
    }

    fn ended(translator: &Translator, tid: u32, result: u64, interval: u64) -> Translated {
        let what = What::Ended { function: Function::Realloc, result, stack: 9, interval };
        translator.translate(&event(tid, what)).unwrap()
    }

    #[test]
    fn an_end_is_matched_with_its_threads_beginning() {
        let mut translator = Translator::default();
        assert_eq!(ended(&translator, 1, 0x20, 0).observation, Observation::Unmatched);
        for tid in [1, 2] {
            let args = [0x10 * u64::from(tid), 100, 0];
            translator.recorded(&event(tid, What::Begins { function: Function::Realloc, args }));
        }
        let request = Request::Reallocate { old: RemoteAddr(0x20), size: 100 };
        let function = Function::Realloc;
        let answer = |answer| Observation::Ended { function, request, answer };
        let moved = ended(&translator, 2, 0x30, 512);
        assert_eq!((moved.observation, moved.interval), (answer(Answer::Address(RemoteAddr(0x30))), 512));
        assert_eq!(ended(&translator, 2, 0, 512).observation, answer(Answer::Failed));
        // Only what was given back counts.
        assert_eq!(ended(&translator, 2, 0x30, NOT_SAMPLED).observation, answer(Answer::Done));
        assert_eq!(ended(&translator, 2, 0, NOT_SAMPLED).observation, answer(Answer::Failed));
        translator.recorded(&event(2, What::Ended { function, result: 0x30, stack: 0, interval: 0 }));
        assert_eq!(ended(&translator, 2, 0x30, 0).observation, Observation::Unmatched);
        assert_ne!(ended(&translator, 1, 0x30, 0).observation, Observation::Unmatched);
    }

    #[test]
    fn a_failed_mapping_has_another_answer_than_a_failed_allocation() {
        let answer = |function, address| {
            let address = RemoteAddr(address);
            let what = What::Allocated { function, address, size: 8, stack: 0, interval: 0 };
            match Translator::default().translate(&event(1, what)).unwrap().observation {
                Observation::Ended { answer, .. } => answer,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(answer(Function::Mmap, u64::MAX), Answer::Failed);
        assert_eq!(answer(Function::Realloc, 0), Answer::Failed);
        assert_eq!(answer(Function::Realloc, 64), Answer::Address(RemoteAddr(64)));
    }
}
