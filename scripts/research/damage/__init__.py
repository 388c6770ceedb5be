"""Does a tensor's score predict the damage that training it does?"""
