//! How the caller of a frame is found, in four bytes, and one step by it. Without std and without a panic: this is compiled into the
//! in-target agent, too, and either side must find the same frames.
//!
//! What compilers do needs two registers only: the canonical frame address (CFA: rsp before the call) is a distance from rsp or
//! rbp, the return address lies below it, the caller's rbp is still there or lies at a distance from it. Everything else (CFAs from other
//! registers, general DWARF expressions) has no rule: there the stack is cut short, and that is told.

/// Where the caller of a place in the code is. Made by [`Rule::new`], which says what can't be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct Rule(pub u32);

/// What a rule's CFA is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cfa {
    /// Nothing is known.
    Unknown,
    /// There is no caller: the thread began here.
    Outermost,
    /// rsp + bytes.
    Sp(u32),
    /// rbp + bytes.
    Bp(u32),
    /// What the word at rbp + bytes says: of functions that align their stack.
    AtBp(i32),
    /// 8 above what the word at rsp + bytes says: of assembly that aligns its stack (OpenSSL's).
    AtSp(i32),
    /// rsp + 8, from so many bytes into an entry of 16 on rsp + 16: the procedure linkage table.
    Plt(u32),
    /// rsp is where the kernel has put the registers (`struct ucontext`): the return from a signal's handler.
    Signal,
}

/// What becomes of rbp.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bp {
    /// The caller's is still there.
    Kept,
    /// It lies so many bytes below the CFA.
    Saved(u32),
    /// It lies where rbp leads.
    AtBp,
    /// It is lost.
    Lost,
}

const KIND_BITS: u32 = 3;
const CFA_BITS: u32 = 17;
const BP_SHIFT: u32 = KIND_BITS + CFA_BITS;
const CFA_LIMIT: u32 = 1 << CFA_BITS;
/// Values of the part for rbp: 0 kept, words below the CFA, and these.
const BP_AT_BP: u32 = 0xffe;
const BP_LOST: u32 = 0xfff;

impl Rule {
    /// Nothing is known.
    pub const UNKNOWN: Self = Self(0);

    /// The rule for these; `None` where they have no room (distances of a megabyte and more, or that are no multiple of 8).
    pub fn new(cfa: Cfa, bp: Bp) -> Option<Self> {
        let (kind, part) = match cfa {
            Cfa::Unknown => return Some(Self::UNKNOWN),
            Cfa::Outermost => (1, 0),
            Cfa::Sp(bytes) => (2, words(bytes)?),
            Cfa::Bp(bytes) => (3, words(bytes)?),
            Cfa::AtBp(bytes) => (4, around(bytes)?),
            Cfa::AtSp(bytes) => (7, around(bytes)?),
            Cfa::Plt(from) => (5, (from < CFA_LIMIT).then_some(from)?),
            Cfa::Signal => (6, 0),
        };
        let bp = match bp {
            Bp::Kept => 0,
            Bp::Saved(below) => words(below).filter(|words| (1..BP_AT_BP).contains(words))?,
            Bp::AtBp => BP_AT_BP,
            Bp::Lost => BP_LOST,
        };
        Some(Self(kind | part << KIND_BITS | bp << BP_SHIFT))
    }

    /// What its CFA is.
    #[inline(always)]
    pub fn cfa(self) -> Cfa {
        let part = (self.0 >> KIND_BITS) & (CFA_LIMIT - 1);
        match self.0 & ((1 << KIND_BITS) - 1) {
            1 => Cfa::Outermost,
            2 => Cfa::Sp(part * 8),
            3 => Cfa::Bp(part * 8),
            4 => Cfa::AtBp((part as i32 - CFA_LIMIT as i32 / 2) * 8),
            5 => Cfa::Plt(part),
            6 => Cfa::Signal,
            7 => Cfa::AtSp((part as i32 - CFA_LIMIT as i32 / 2) * 8),
            _ => Cfa::Unknown,
        }
    }

    /// What becomes of rbp.
    #[inline(always)]
    pub fn bp(self) -> Bp {
        match self.0 >> BP_SHIFT {
            0 => Bp::Kept,
            BP_AT_BP => Bp::AtBp,
            BP_LOST => Bp::Lost,
            words => Bp::Saved(words * 8),
        }
    }
}

fn words(bytes: u32) -> Option<u32> {
    if bytes.is_multiple_of(8) && bytes / 8 < CFA_LIMIT { Some(bytes / 8) } else { None }
}

/// Half of the values are below the register.
fn around(bytes: i32) -> Option<u32> {
    words(u32::try_from(bytes.checked_add((CFA_LIMIT as i32 / 2) * 8)?).ok()?)
}

/// The registers of a frame that its caller is found by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Registers {
    /// Where it executes. In a frame that has called, where the call returns to ([`Registers::is_return`]).
    pub pc: u64,
    /// Its rsp.
    pub sp: u64,
    /// Its rbp; `None` once it was lost.
    pub bp: Option<u64>,
    /// It has called another: the instruction it executes is the one before [`Registers::pc`].
    pub is_return: bool,
}

impl Registers {
    /// An address within the instruction that is executed: what a rule, a function and a line are looked up by.
    #[inline(always)]
    pub fn at(&self) -> u64 {
        self.pc.wrapping_sub(self.is_return as u64)
    }
}

/// What a step came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// The caller.
    To(Registers),
    /// There is no caller.
    End,
    /// Nobody knows: the stack is cut short.
    Cut,
}

/// `struct ucontext` of x86-64 (asm/ucontext.h, asm/sigcontext.h): where the kernel keeps registers of a thread in its signal's handler.
const UCONTEXT_BP: u64 = 120;
const UCONTEXT_SP: u64 = 160;
const UCONTEXT_PC: u64 = 168;

/// The caller of a frame by its rule. `read` gives a word of the stack, `None` where there is none to be read.
///
/// The stack grows down, so a caller's frame lies above: what leads down or nowhere cuts the stack short. Only a signal's handler may have
/// a stack of its own.
#[inline(always)]
pub fn step(rule: Rule, frame: &Registers, mut read: impl FnMut(u64) -> Option<u64>) -> Step {
    let cfa = match rule.cfa() {
        Cfa::Unknown => return Step::Cut,
        Cfa::Outermost => return Step::End,
        Cfa::Sp(bytes) => Some(frame.sp.wrapping_add(bytes as u64)),
        Cfa::Bp(bytes) => frame.bp.map(|bp| bp.wrapping_add(bytes as u64)),
        Cfa::AtBp(bytes) => frame.bp.and_then(|bp| read(bp.wrapping_add_signed(bytes as i64))),
        Cfa::AtSp(bytes) => read(frame.sp.wrapping_add_signed(bytes as i64)).map(|word| word.wrapping_add(8)),
        Cfa::Plt(from) => {
            let pushed = frame.pc & 15 >= from as u64;
            Some(frame.sp.wrapping_add(if pushed { 16 } else { 8 }))
        }
        Cfa::Signal => return from_signal(frame.sp, read),
    };
    let Some(cfa) = cfa.filter(|cfa| *cfa > frame.sp && *cfa & 7 == 0) else { return Step::Cut };
    let Some(pc) = read(cfa.wrapping_sub(8)) else { return Step::Cut };
    let bp = match rule.bp() {
        Bp::Kept => frame.bp,
        Bp::Saved(below) => read(cfa.wrapping_sub(below as u64)),
        Bp::AtBp => frame.bp.and_then(&mut read),
        Bp::Lost => None,
    };
    if pc == 0 { Step::End } else { Step::To(Registers { pc, sp: cfa, bp, is_return: true }) }
}

#[inline(always)]
fn from_signal(context: u64, mut read: impl FnMut(u64) -> Option<u64>) -> Step {
    let pc = read(context.wrapping_add(UCONTEXT_PC));
    let sp = read(context.wrapping_add(UCONTEXT_SP));
    match (pc, sp) {
        (Some(pc), Some(sp)) => {
            let bp = read(context.wrapping_add(UCONTEXT_BP));
            Step::To(Registers { pc, sp, bp, is_return: false })
        }
        _ => Step::Cut,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cfa() -> impl Strategy<Value = Cfa> {
        let bytes = (0u32..CFA_LIMIT).prop_map(|words| words * 8);
        let around = (-(CFA_LIMIT as i32) / 2..CFA_LIMIT as i32 / 2).prop_map(|words| words * 8);
        prop_oneof![
            Just(Cfa::Outermost),
            Just(Cfa::Signal),
            bytes.clone().prop_map(Cfa::Sp),
            bytes.prop_map(Cfa::Bp),
            around.clone().prop_map(Cfa::AtBp),
            around.prop_map(Cfa::AtSp),
            (0u32..16).prop_map(Cfa::Plt),
        ]
    }

    fn bp() -> impl Strategy<Value = Bp> {
        let saved = (1u32..BP_AT_BP).prop_map(|words| Bp::Saved(words * 8));
        prop_oneof![Just(Bp::Kept), Just(Bp::Lost), Just(Bp::AtBp), saved]
    }

    proptest! {
        #[test]
        fn a_rule_is_what_it_was_made_of(cfa in cfa(), bp in bp()) {
            let rule = Rule::new(cfa, bp).unwrap();
            prop_assert_eq!((rule.cfa(), rule.bp()), (cfa, bp));
        }

        #[test]
        fn any_rule_on_any_stack_leads_up_or_ends(rule: u32, pc: u64, sp: u64, bp: Option<u64>, words: Vec<u64>) {
            let mut words = words.into_iter().map(Some).chain([None]).cycle();
            let frame = Registers { pc, sp, bp, is_return: true };
            if let Step::To(caller) = step(Rule(rule), &frame, |_| words.next().flatten()) {
                prop_assert!(caller.sp > sp || Rule(rule).cfa() == Cfa::Signal);
            }
        }
    }

    #[test]
    fn what_has_no_room_is_refused() {
        assert_eq!(Rule::new(Cfa::Sp(12), Bp::Kept), None);
        assert_eq!(Rule::new(Cfa::Sp(CFA_LIMIT * 8), Bp::Kept), None);
        assert_eq!(Rule::new(Cfa::Sp(8), Bp::Saved(BP_AT_BP * 8)), None);
    }

    #[test]
    fn a_frame_with_a_frame_pointer_leads_to_its_caller() {
        let rule = Rule::new(Cfa::Bp(16), Bp::Saved(16)).unwrap();
        let frame = Registers { pc: 5, sp: 0x100, bp: Some(0x180), is_return: false };
        let read = |at| match at {
            0x188 => Some(0xabc),
            0x180 => Some(0x400),
            _ => None,
        };
        let caller = Registers { pc: 0xabc, sp: 0x190, bp: Some(0x400), is_return: true };
        assert_eq!(step(rule, &frame, read), Step::To(caller));
        assert_eq!(step(rule, &Registers { bp: None, ..frame }, read), Step::Cut);
        assert_eq!(step(rule, &Registers { bp: Some(0x80), ..frame }, read), Step::Cut);
    }
}
