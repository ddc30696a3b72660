//! What a hit of a breakpoint means: calls under way per thread, and which of them count.
//!
//! A call counts once, at the outermost entry: `realloc` → `malloc` → `mmap` is one reallocation. Calls whose
//! answer is seen end by their return's trap. A `free` has none: whether it is still under way is told by the
//! return address that its thunk left on the stack, and zeroes when it comes back.
//!
//! A thread may leave a call without returning (longjmp, an exception thrown through it, pthread_exit): a call
//! whose frame lies below the stack pointer of a later entry is over.

use super::function::{Answer, Function, Request};
use super::region::Thunk;
use crate::addr::RemoteAddr;
use crate::inferior::sys::Registers;
use crate::memory::RemoteMemory;
use std::collections::HashMap;

/// What a trap at a known address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trap {
    /// A function is entered.
    Entry(usize),
    /// A function that was entered through its thunk comes back.
    Return(usize),
}

/// What happened, as the outermost call tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observation {
    /// Nothing that counts: a nested call, `free(NULL)`.
    Nothing,
    /// A call that may give `what` back begins; whether it does, its end tells.
    Begins {
        /// By which function.
        function: Function,
        /// What it was asked.
        request: Request,
    },
    /// A block is given back, for certain.
    Freed {
        /// By which function.
        function: Function,
        /// Which block.
        address: RemoteAddr,
    },
    /// A block may be given back inside another call: it counts when it is not what that call is about (a hook in the
    /// allocator, such as tracemalloc's, keeps books of its own).
    FreedInside {
        /// By which function.
        function: Function,
        /// Which block.
        address: RemoteAddr,
    },
    /// A call ended.
    Ended {
        /// Which function.
        function: Function,
        /// What it was asked.
        request: Request,
        /// What it came to; `Address` also for posix_memalign.
        answer: Answer,
    },
    /// A return without its entry: a call that began before a signal handler threw away its record.
    Unmatched,
}

/// What has to be done with the thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hit {
    /// Where it goes on, when not right behind the int3.
    pub goes_on: Option<RemoteAddr>,
    /// What its call tells.
    pub observation: Observation,
}

#[derive(Debug, Clone, Copy)]
struct Pending {
    thunk: usize,
    request: Request,
    /// Address of the word that holds the thunk's return address.
    slot: RemoteAddr,
}

/// The calls under way in a process.
#[derive(Debug, Default)]
pub struct Calls {
    thunks: Vec<Thunk>,
    traps: HashMap<u64, Trap>,
    /// The outermost call of each thread that is in one.
    pending: HashMap<i32, Pending>,
}

impl Calls {
    /// No calls yet, through these thunks.
    pub fn new(thunks: Vec<Thunk>) -> Self {
        let mut traps = HashMap::new();
        for (i, thunk) in thunks.iter().enumerate() {
            traps.insert(thunk.entry_trap.0, Trap::Entry(i));
            if thunk.function.has_answer() {
                traps.insert(thunk.return_address.0 + 1, Trap::Return(i));
            }
        }
        Self { thunks, traps, pending: HashMap::new() }
    }

    /// What an int3 that reports `rip` is, when it is one of ours.
    pub fn trap_at(&self, rip: u64) -> Option<Trap> {
        self.traps.get(&rip).copied()
    }

    /// The thunks.
    pub fn thunks(&self) -> &[Thunk] {
        &self.thunks
    }

    /// Where execution goes on behind each trap, as if the breakpoints were not there.
    pub fn bypasses(&self) -> HashMap<u64, RemoteAddr> {
        let to = |(rip, trap): (&u64, &Trap)| match trap {
            Trap::Entry(i) => (*rip, self.thunks[*i].bypass),
            Trap::Return(_) => (*rip, RemoteAddr(*rip)),
        };
        self.traps.iter().map(to).collect()
    }

    /// Takes a hit of `trap` by thread `tid`.
    pub fn hit(&mut self, tid: i32, trap: Trap, regs: &Registers, memory: &dyn RemoteMemory) -> Hit {
        match trap {
            Trap::Entry(thunk) => self.entry(tid, thunk, regs, memory),
            Trap::Return(thunk) => {
                Hit { goes_on: None, observation: self.returned(tid, thunk, regs, memory) }
            }
        }
    }

    fn entry(&mut self, tid: i32, index: usize, regs: &Registers, memory: &dyn RemoteMemory) -> Hit {
        let thunk = self.thunks[index];
        let request = thunk.function.request(regs);
        let pass = |observation| Hit { goes_on: Some(thunk.bypass), observation };
        if request == Request::Nothing {
            return pass(Observation::Nothing);
        }
        if self.is_inside(tid, regs.rsp, memory) {
            return pass(match request {
                Request::Free { address } => Observation::FreedInside { function: thunk.function, address },
                _ => Observation::Nothing,
            });
        }
        // `record` pushes 8 bytes and the return address below the entry's stack pointer.
        let slot = RemoteAddr(regs.rsp).back(16);
        self.pending.insert(tid, Pending { thunk: index, request, slot });
        let observation = match request {
            Request::Free { address } => Observation::Freed { function: thunk.function, address },
            Request::Reallocate { .. } | Request::Remap { .. } | Request::Unmap { .. } => {
                Observation::Begins { function: thunk.function, request }
            }
            _ => Observation::Nothing,
        };
        Hit { goes_on: Some(thunk.record), observation }
    }

    /// Whether the thread, with this stack pointer at an entry, is inside a call that counts.
    fn is_inside(&mut self, tid: i32, rsp: u64, memory: &dyn RemoteMemory) -> bool {
        let Some(call) = self.pending.get(&tid) else { return false };
        // Equal in a tail call: the function entered returns to our thunk itself.
        let inside = rsp <= call.slot.0 && still_there(&self.thunks[call.thunk], call.slot, memory);
        if !inside {
            self.pending.remove(&tid);
        }
        inside
    }

    fn returned(
        &mut self,
        tid: i32,
        index: usize,
        regs: &Registers,
        memory: &dyn RemoteMemory,
    ) -> Observation {
        let slot = RemoteAddr(regs.rsp).back(8);
        let Some(call) = self.pending.remove(&tid) else { return Observation::Unmatched };
        if call.thunk != index || call.slot != slot {
            return Observation::Unmatched;
        }
        let function = self.thunks[index].function;
        let answer = match (call.request, call.request.answer(regs.rax)) {
            (Request::AllocateInto { out, .. }, Answer::Stored) => {
                memory.read_ptr(out).map_or(Answer::Failed, Answer::Address)
            }
            (_, answer) => answer,
        };
        Observation::Ended { function, request: call.request, answer }
    }

    /// Whether any thread is inside a thunk. `alive` are the threads that exist, with their stack pointers.
    pub fn any_under_way(&self, memory: &dyn RemoteMemory, alive: &[(i32, Registers)]) -> bool {
        alive.iter().any(|(tid, regs)| {
            self.pending.get(tid).is_some_and(|call| {
                regs.rsp <= call.slot.0.wrapping_add(8)
                    && still_there(&self.thunks[call.thunk], call.slot, memory)
            })
        })
    }

    /// The thread ended.
    pub fn forget(&mut self, tid: i32) {
        self.pending.remove(&tid);
    }
}

fn still_there(thunk: &Thunk, slot: RemoteAddr, memory: &dyn RemoteMemory) -> bool {
    memory.read_ptr(slot).is_ok_and(|found| found == thunk.return_address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inferior::sys::no_registers;
    use crate::memory::BytesMemory;

    const STACK: u64 = 0x7000_0000;

    fn thunk(function: Function, at: u64) -> Thunk {
        Thunk {
            function,
            entry: Some(RemoteAddr(at)),
            entry_trap: RemoteAddr(at + 1),
            bypass: RemoteAddr(at + 0x100),
            record: RemoteAddr(at + 0x200),
            return_address: RemoteAddr(at + 0x300),
        }
    }

    fn calls() -> Calls {
        Calls::new(vec![
            thunk(Function::Malloc, 0x1000),
            thunk(Function::Free, 0x2000),
            thunk(Function::Realloc, 0x3000),
        ])
    }

    fn at(rsp: u64, rdi: u64, rsi: u64, rax: u64) -> Registers {
        Registers { rsp, rdi, rsi, rax, ..no_registers() }
    }

    /// A stack whose word at `slot` holds `value`.
    fn stack(slot: u64, value: u64) -> BytesMemory {
        let mut bytes = vec![0; 4096];
        let at = (slot - STACK) as usize;
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        let mut memory = BytesMemory::new();
        memory.map(RemoteAddr(STACK), bytes);
        memory
    }

    #[test]
    fn a_malloc_is_told_at_its_return() {
        let (mut calls, rsp) = (calls(), STACK + 0x800);
        let memory = stack(rsp - 16, 0x1300);
        let hit = calls.hit(1, Trap::Entry(0), &at(rsp, 40, 0, 0), &memory);
        assert_eq!(hit, Hit { goes_on: Some(RemoteAddr(0x1200)), observation: Observation::Nothing });
        let hit = calls.hit(1, Trap::Return(0), &at(rsp - 8, 0, 0, 0xabc0), &memory);
        assert_eq!(
            hit.observation,
            Observation::Ended {
                function: Function::Malloc,
                request: Request::Allocate { size: Some(40) },
                answer: Answer::Address(RemoteAddr(0xabc0)),
            }
        );
    }

    #[test]
    fn a_malloc_inside_a_realloc_does_not_count() {
        let (mut calls, rsp) = (calls(), STACK + 0x800);
        let memory = stack(rsp - 16, 0x3300);
        let hit = calls.hit(1, Trap::Entry(2), &at(rsp, 0x50, 99, 0), &memory);
        let request = Request::Reallocate { old: RemoteAddr(0x50), size: 99 };
        assert_eq!(hit.observation, Observation::Begins { function: Function::Realloc, request });
        let hit = calls.hit(1, Trap::Entry(0), &at(rsp - 0x60, 99, 0, 0), &memory);
        assert_eq!(hit, Hit { goes_on: Some(RemoteAddr(0x1100)), observation: Observation::Nothing });
        let hit = calls.hit(1, Trap::Return(2), &at(rsp - 8, 0, 0, 0x60), &memory);
        assert!(matches!(hit.observation, Observation::Ended { function: Function::Realloc, .. }));
    }

    #[test]
    fn a_call_made_as_the_last_act_of_another_is_inside_it() {
        let (mut calls, rsp) = (calls(), STACK + 0x800);
        let memory = stack(rsp - 16, 0x3300);
        calls.hit(1, Trap::Entry(2), &at(rsp, 0x50, 99, 0), &memory);
        let hit = calls.hit(1, Trap::Entry(0), &at(rsp - 16, 99, 0, 0), &memory);
        assert_eq!(hit, Hit { goes_on: Some(RemoteAddr(0x1100)), observation: Observation::Nothing });
    }

    #[test]
    fn a_free_that_came_back_does_not_hide_the_next_call() {
        let (mut calls, rsp) = (calls(), STACK + 0x800);
        let hit = calls.hit(1, Trap::Entry(1), &at(rsp, 0x50, 0, 0), &stack(rsp - 16, 0x2300));
        assert_eq!(
            hit.observation,
            Observation::Freed { function: Function::Free, address: RemoteAddr(0x50) }
        );
        // Still inside: nested.
        let nested = calls.hit(1, Trap::Entry(0), &at(rsp - 0x40, 7, 0, 0), &stack(rsp - 16, 0x2300));
        assert_eq!(nested.goes_on, Some(RemoteAddr(0x1100)));
        // Its thunk zeroed the slot: over, though the stack is deeper now.
        let next = calls.hit(1, Trap::Entry(0), &at(rsp - 0x40, 7, 0, 0), &stack(rsp - 16, 0));
        assert_eq!(next.goes_on, Some(RemoteAddr(0x1200)));
    }

    #[test]
    fn a_call_left_by_longjmp_is_over_when_the_stack_is_above_it() {
        let (mut calls, rsp) = (calls(), STACK + 0x800);
        calls.hit(1, Trap::Entry(0), &at(rsp, 1, 0, 0), &stack(rsp - 16, 0x1300));
        let hit = calls.hit(1, Trap::Entry(0), &at(rsp + 0x100, 2, 0, 0), &stack(rsp - 16, 0x1300));
        assert_eq!(hit.goes_on, Some(RemoteAddr(0x1200)));
    }

    #[test]
    fn a_return_without_entry_is_told_as_such() {
        let hit = calls().hit(1, Trap::Return(0), &at(STACK + 64, 0, 0, 5), &BytesMemory::new());
        assert_eq!(hit.observation, Observation::Unmatched);
    }
}
