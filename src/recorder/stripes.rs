//! [`Stripes`]: which number of each stripe is to be told next. See [`super::merge`] for what it is about.

use super::merge::GIVEN_UP_AFTER;
use crate::agent_abi::STRIPES;
use std::collections::VecDeque;

/// So many numbers in a row don't go missing one by one: what had them was skipped.
const MANY: u32 = 64;
/// Missing numbers of a stripe that are remembered.
const MAX_MISSING: usize = 256;

/// An event's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Number {
    /// Its stripe.
    pub stripe: u16,
    /// Its number there. They wrap.
    pub number: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Stripe {
    /// All smaller ones were told, but for what is missing in a loose stripe.
    next: u32,
    /// Lanes that wait for it.
    waiting: u16,
    loose: bool,
}

/// A stripe of which numbers are missing.
#[derive(Debug)]
struct Loose {
    stripe: u16,
    /// Smaller than what was told, and not told: each with when that was found.
    missing: Vec<(u32, u64)>,
    /// What may be told, in order.
    listed: VecDeque<u32>,
}

/// All stripes.
#[derive(Debug)]
pub struct Stripes {
    stripes: Box<[Stripe; STRIPES]>,
    loose: Vec<Loose>,
}

impl Default for Stripes {
    fn default() -> Self {
        Self { stripes: Box::new([Stripe::default(); STRIPES]), loose: Vec::new() }
    }
}

/// How far `number` is behind `next`; they wrap.
fn ahead(number: u32, next: u32) -> i32 {
    number.wrapping_sub(next).cast_signed()
}

impl Stripes {
    /// Whether this is the number to be told next. One that was taken for missing for good is told when it comes.
    #[inline]
    pub fn is_next(&self, Number { stripe, number }: Number) -> bool {
        let entry = &self.stripes[usize::from(stripe)];
        if entry.loose { self.is_listed(stripe, number) } else { ahead(number, entry.next) <= 0 }
    }

    /// This number is told; whether somebody waits for its stripe.
    #[inline]
    pub fn told(&mut self, Number { stripe, number }: Number) -> bool {
        let entry = &mut self.stripes[usize::from(stripe)];
        if ahead(number, entry.next) >= 0 {
            entry.next = number.wrapping_add(1);
        }
        let (loose, waiting) = (entry.loose, entry.waiting > 0);
        if loose {
            self.told_loose(stripe, number);
        }
        waiting
    }

    /// Somebody waits for this stripe.
    pub fn wait(&mut self, stripe: u16) {
        self.stripes[usize::from(stripe)].waiting += 1;
    }

    /// They do no longer.
    pub fn wait_no_more(&mut self, stripe: u16) {
        self.stripes[usize::from(stripe)].waiting -= 1;
    }

    /// Whether any stripe has numbers missing.
    pub fn any_loose(&self) -> bool {
        !self.loose.is_empty()
    }

    /// Whether this one has.
    pub fn is_loose(&self, stripe: u16) -> bool {
        self.stripes[usize::from(stripe)].loose
    }

    /// Those that have.
    pub fn loose(&self) -> Vec<u16> {
        self.loose.iter().map(|loose| loose.stripe).collect()
    }

    /// Makes a stripe loose, if the number to be told next is not among those that are `seen`.
    pub fn loosen(&mut self, stripe: u16, seen: &[(Number, bool)], now: u64) {
        let next = self.stripes[usize::from(stripe)].next;
        if seen.iter().any(|(n, _)| n.stripe == stripe && ahead(n.number, next) <= 0) {
            return;
        }
        self.stripes[usize::from(stripe)].loose = true;
        self.loose.push(Loose { stripe, missing: Vec::new(), listed: VecDeque::new() });
        self.settle(stripe, seen, now);
    }

    /// Lists what of a loose stripe may be told: the settled numbers, up to the first that is not.
    pub fn settle(&mut self, stripe: u16, seen: &[(Number, bool)], now: u64) {
        let next = self.stripes[usize::from(stripe)].next;
        let Some(loose) = self.loose.iter_mut().find(|loose| loose.stripe == stripe) else { return };
        let mut numbers: Vec<(u32, bool)> = seen
            .iter()
            .filter(|(n, _)| n.stripe == stripe)
            .map(|(n, settled)| (n.number, *settled))
            .collect();
        numbers.sort_unstable_by_key(|(number, _)| ahead(*number, next));
        let (mut expected, mut listed) = (next, VecDeque::new());
        for (number, settled) in numbers {
            if !settled {
                break;
            }
            let gap = ahead(number, expected);
            if gap >= 0 {
                if gap <= MANY as i32 {
                    loose.missing.extend((0..gap as u32).map(|i| (expected.wrapping_add(i), now)));
                }
                expected = number.wrapping_add(1);
            }
            listed.push_back(number);
        }
        // What was listed and not told yet is seen again; its gaps are known.
        loose.missing.sort_unstable();
        loose.missing.dedup_by_key(|(number, _)| *number);
        loose.missing.truncate(MAX_MISSING);
        loose.listed = listed;
        self.tighten(stripe);
    }

    /// No longer reckons with numbers that were found missing before `since`.
    pub fn give_up(&mut self, since: u64) {
        for stripe in self.loose() {
            if let Some(loose) = self.loose.iter_mut().find(|loose| loose.stripe == stripe) {
                loose.missing.retain(|(_, found)| *found > since);
            }
        }
    }

    /// Makes `number` the next one, whatever is missing.
    pub fn force(&mut self, Number { stripe, number }: Number) {
        self.loose.retain(|loose| loose.stripe != stripe);
        let entry = &mut self.stripes[usize::from(stripe)];
        (entry.loose, entry.next) = (false, number);
    }

    #[cold]
    fn is_listed(&self, stripe: u16, number: u32) -> bool {
        let loose = self.loose.iter().find(|loose| loose.stripe == stripe);
        loose.is_some_and(|loose| loose.listed.front() == Some(&number))
    }

    #[cold]
    fn told_loose(&mut self, stripe: u16, number: u32) {
        if let Some(loose) = self.loose.iter_mut().find(|loose| loose.stripe == stripe) {
            loose.missing.retain(|(missing, _)| *missing != number);
            if loose.listed.front() == Some(&number) {
                loose.listed.pop_front();
            }
        }
        self.tighten(stripe);
    }

    /// A stripe of which nothing is missing goes by its numbers again.
    fn tighten(&mut self, stripe: u16) {
        let Some(at) = self.loose.iter().position(|loose| loose.stripe == stripe) else { return };
        if self.loose[at].missing.is_empty() && self.loose[at].listed.is_empty() {
            self.loose.swap_remove(at);
            self.stripes[usize::from(stripe)].loose = false;
        }
    }
}

const _: () = assert!(GIVEN_UP_AFTER > 0 && STRIPES <= u16::MAX as usize);
